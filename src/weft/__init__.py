"""weft: several LoRA adapters of one language model, mixed token by token and layer by layer (X-LoRA).

The packages and modules, lowest first. Each imports only from those before it, and its docstring lists its files:

    errors, kernels, files, screen, options, distributed    the basis
    checkpoint, config                              a saved mixture as values; its options
    base_model, gate, data                          base model, gate, training data
    layers, passes, model                           the experts of a layer; a call of the model; the model
    generation, train, evaluate                     use of a model
    formats, traces, serve                          other layouts and the Hub; recordings of the gate; servers
    cli                                             the command line

The public names are loaded on first use, so `import weft` imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily
from weft.moved import find_moved_modules
from weft.screen.libraries import hide_notices

if TYPE_CHECKING:
    from weft.config import XLoraConfig as XLoraConfig
    from weft.formats.card import write_card as write_card
    from weft.formats.convert import convert_mixture as convert_mixture
    from weft.formats.experts import add_expert as add_expert
    from weft.formats.experts import drop_expert as drop_expert
    from weft.formats.folding import fold as fold
    from weft.formats.folding import mean_scalings as mean_scalings
    from weft.formats.hub import pull as pull
    from weft.formats.hub import push as push
    from weft.gate.classifier import XLoraClassifier as XLoraClassifier
    from weft.generation.stream import Generation as Generation
    from weft.generation.stream import Step as Step
    from weft.generation.stream import generate as generate
    from weft.generation.stream import stream as stream
    from weft.model.build import from_adapters as from_adapters
    from weft.model.build import from_pretrained as from_pretrained
    from weft.model.model import XLoraModel as XLoraModel
    from weft.model.registration import register_with_peft as register_with_peft
    from weft.model.registration import unregister_from_peft as unregister_from_peft
    from weft.traces.record import trace as trace
    from weft.traces.record import trace_data as trace_data
    from weft.traces.record import trace_generation as trace_generation
    from weft.traces.trace import Trace as Trace
    from weft.train.callbacks import GateCallback as GateCallback
    from weft.train.gate_fit import fit_gate as fit_gate
    from weft.train.scaling_cache import ScalingCache as ScalingCache
    from weft.train.scaling_cache import ScalingCacheCollator as ScalingCacheCollator

__version__ = "0.1.0"

_HOMES = {
    "GateCallback": "weft.train.callbacks",
    "Generation": "weft.generation.stream",
    "ScalingCache": "weft.train.scaling_cache",
    "ScalingCacheCollator": "weft.train.scaling_cache",
    "Step": "weft.generation.stream",
    "Trace": "weft.traces.trace",
    "XLoraClassifier": "weft.gate.classifier",
    "XLoraConfig": "weft.config",
    "XLoraModel": "weft.model.model",
    "add_expert": "weft.formats.experts",
    "convert_mixture": "weft.formats.convert",
    "drop_expert": "weft.formats.experts",
    "fit_gate": "weft.train.gate_fit",
    "fold": "weft.formats.folding",
    "from_adapters": "weft.model.build",
    "from_pretrained": "weft.model.build",
    "generate": "weft.generation.stream",
    "mean_scalings": "weft.formats.folding",
    "pull": "weft.formats.hub",
    "push": "weft.formats.hub",
    "register_with_peft": "weft.model.registration",
    "stream": "weft.generation.stream",
    "trace": "weft.traces.record",
    "trace_data": "weft.traces.record",
    "trace_generation": "weft.traces.record",
    "unregister_from_peft": "weft.model.registration",
    "write_card": "weft.formats.card",
}

__all__ = sorted(_HOMES)  # noqa: PLE0605
__getattr__, __dir__ = lazily(__name__, _HOMES)
find_moved_modules()
hide_notices()

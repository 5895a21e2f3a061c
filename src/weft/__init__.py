"""weft: several LoRA adapters of one language model, mixed token by token and layer by layer (X-LoRA).

The public names are loaded on first use, so that `import weft` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.callbacks import GateCallback
    from weft.card import write_card
    from weft.change_experts import add_expert, drop_expert
    from weft.config import XLoraConfig
    from weft.folding import fold, mean_scalings
    from weft.formats import convert_mixture
    from weft.gate import XLoraClassifier
    from weft.gate_start import fit_gate
    from weft.hub import pull, push
    from weft.integration import from_adapters, from_pretrained, register_with_peft, unregister_from_peft
    from weft.model import XLoraModel
    from weft.scaling_cache import ScalingCache, ScalingCacheCollator
    from weft.streaming import Generation, Step, generate, stream
    from weft.traces import Trace
    from weft.tracing import trace, trace_data, trace_generation

__version__ = "0.1.0"

_HOMES = {
    "GateCallback": "weft.callbacks",
    "Generation": "weft.streaming",
    "ScalingCache": "weft.scaling_cache",
    "ScalingCacheCollator": "weft.scaling_cache",
    "Step": "weft.streaming",
    "Trace": "weft.traces",
    "XLoraConfig": "weft.config",
    "XLoraClassifier": "weft.gate",
    "XLoraModel": "weft.model",
    "add_expert": "weft.change_experts",
    "convert_mixture": "weft.formats",
    "drop_expert": "weft.change_experts",
    "fit_gate": "weft.gate_start",
    "fold": "weft.folding",
    "from_adapters": "weft.integration",
    "from_pretrained": "weft.integration",
    "generate": "weft.streaming",
    "mean_scalings": "weft.folding",
    "pull": "weft.hub",
    "push": "weft.hub",
    "register_with_peft": "weft.integration",
    "stream": "weft.streaming",
    "trace": "weft.tracing",
    "trace_data": "weft.tracing",
    "trace_generation": "weft.tracing",
    "unregister_from_peft": "weft.integration",
    "write_card": "weft.card",
}

__all__ = [
    "GateCallback",
    "Generation",
    "ScalingCache",
    "ScalingCacheCollator",
    "Step",
    "Trace",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraModel",
    "add_expert",
    "convert_mixture",
    "drop_expert",
    "fit_gate",
    "fold",
    "from_adapters",
    "from_pretrained",
    "generate",
    "mean_scalings",
    "pull",
    "push",
    "register_with_peft",
    "stream",
    "trace",
    "trace_data",
    "trace_generation",
    "unregister_from_peft",
    "write_card",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        return getattr(importlib.import_module(home), name)
    try:
        return importlib.import_module(f"weft.{name}")
    except ModuleNotFoundError as err:
        if err.name != f"weft.{name}":
            raise
        raise AttributeError(f"module 'weft' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

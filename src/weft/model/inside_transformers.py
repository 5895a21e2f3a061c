"""A mixture that transformers puts into a base model by itself: `AutoModelForCausalLM.from_pretrained`, `pipeline`.

transformers then has the base model and no `PeftModel` around it. So the base holds the gate, which moves along with
it, and knows that the mixture's tensors are loaded, for which transformers would look under names of its own.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from weft.base_model.versions import with_none_missing
from weft.checkpoint.folder import SavedMixture
from weft.errors import CheckpointError
from weft.model.saving import load_gate

_GATE = "internal_xlora_classifier"
_METHODS = ("_load_pretrained_model", "disable_adapters", "enable_adapters", "save_pretrained")


def settle_in(base: Any, tuner: Any, saved: SavedMixture) -> None:
    """Load the rest of a saved mixture, whose experts are in the base model, and let this answer for it.

    Args:
        base: a model of transformers.
        tuner: the `XLoraModel` around it.
        saved: its folder.

    Raises:
        CheckpointError: the gate is missing, broken, or of another mixture.
    """
    outer = nn.Module()  # in the place of a PeftModel, whose names the file has
    outer.base_model = tuner
    load_gate(outer, saved)
    base.add_module(_GATE, tuner.internal_xlora_classifier)
    if not base.training:
        base.eval()  # what was put in as well, which transformers before 5.4 left in training mode
    base.disable_adapters, base.enable_adapters = tuner.disable_adapter_layers, tuner.enable_adapter_layers
    base.save_pretrained = functools.partial(_refuse_saving, str(saved.folder))
    load = getattr(base, "_load_pretrained_model", None)
    if load is not None:
        base._load_pretrained_model = functools.partial(_load_others, load, saved.folder)


def leave(base: nn.Module) -> None:
    """Undo `settle_in`, if it was done."""
    base._modules.pop(_GATE, None)
    for name in _METHODS:
        base.__dict__.pop(name, None)


def _load_others(load: Any, folder: Path, *args: Any, load_config: Any, **kwargs: Any) -> Any:
    """transformers' loading of tensors into the model, but for the mixture's own, which are there."""
    path = getattr(load_config, "pretrained_model_name_or_path", None)
    if path is None or Path(path).resolve() != folder.resolve():
        return load(*args, load_config=load_config, **kwargs)
    return with_none_missing(
        load(*args, load_config=load_config, **{**kwargs, "state_dict": {}, "checkpoint_files": []})
    )


def _refuse_saving(folder: str, *args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        f"this base model with the mixture {folder} in it cannot be saved by transformers, which knows one adapter at "
        "a time: load the mixture with weft.from_pretrained, whose save_pretrained writes all of it"
    )

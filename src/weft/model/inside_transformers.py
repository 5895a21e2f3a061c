"""A mixture that transformers itself loads into a base model: `AutoModelForCausalLM.from_pretrained`, `pipeline`.

The user then has the base model without a `PeftModel`. So the gate becomes a submodule of the base model, and moves
with it. transformers would look for the mixture's tensors under other keys, so its loading of them is skipped.
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


def attach_to_base(base: Any, tuner: Any, saved: SavedMixture) -> None:
    """Load the gate of a saved mixture whose experts are in the base model, and adapt the base model's methods.

    Args:
        base: a model of transformers.
        tuner: the `XLoraModel` around it.
        saved: the mixture's folder.

    Raises:
        CheckpointError: the gate is missing, broken, or belongs to another mixture.
    """
    outer = nn.Module()  # replaces the PeftModel, whose names are in the file's keys
    outer.base_model = tuner
    load_gate(outer, saved)
    base.add_module(_GATE, tuner.internal_xlora_classifier)
    if not base.training:
        base.eval()  # transformers before 5.4 leaves new modules in training mode
    base.disable_adapters, base.enable_adapters = tuner.disable_adapter_layers, tuner.enable_adapter_layers
    base.save_pretrained = functools.partial(_refuse_saving, str(saved.folder))
    load = getattr(base, "_load_pretrained_model", None)
    if load is not None:
        base._load_pretrained_model = functools.partial(_load_others, load, saved.folder)


def detach_from_base(base: nn.Module) -> None:
    """Undo `attach_to_base`, if it was called."""
    base._modules.pop(_GATE, None)
    for name in _METHODS:
        base.__dict__.pop(name, None)


def _load_others(load: Any, folder: Path, *args: Any, load_config: Any, **kwargs: Any) -> Any:
    """transformers' loading of an adapter's tensors, without the mixture's own, which are loaded already."""
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

"""Writes the layout of mistral.rs (`checkpoint/mistralrs_layout.py` reads it)."""

from __future__ import annotations

import shutil
from pathlib import Path

from peft.utils import CONFIG_NAME
from torch import Tensor

from weft.checkpoint.mistralrs_layout import ORDERING
from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG, ORIGINAL_GATE
from weft.formats.layout import save_tensors, write_json
from weft.formats.mixture import MixtureFiles
from weft.formats.xlora import original_config, original_gate, xlora_problems

# Options of an expert that mistral.rs does not read.
_UNREAD = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform", "exclude_modules")


def mistralrs_problems(files: MixtureFiles) -> list[str]:
    """What mistral.rs does not support in a mixture, one sentence each."""
    problems = xlora_problems(files, "mistral.rs")
    config, first = files.config, files.adapters[0]
    names = list(config.adapters or {})
    for option in ("r", "lora_alpha", "target_modules"):
        values = {adapter.name: getattr(adapter.config, option) for adapter in files.adapters}
        if any(value != values[first.name] for value in values.values()):
            shown = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
            problems.append(f"{option} ({shown}) must be the same for all experts")
    for adapter in files.adapters:
        set_ = [name for name in _UNREAD if getattr(adapter.config, name, None)]
        if set_:
            problems.append(f"expert {adapter.name!r} has {', '.join(set_)}, which mistral.rs does not read")
    targets = first.config.target_modules
    if not isinstance(targets, (set, list)) or any("." in target for target in targets):
        problems.append(f"target_modules ({targets!r}) must be names of single modules, such as 'q_proj'")
    outside = sorted(layer for layer in files.layers if not layer.startswith("model.layers."))
    if outside:
        problems.append(
            f"layers {outside[:5]} are not among the decoder layers ('model.layers.'), which alone it adapts"
        )
    if config.xlora_depth > 1 and config.xlora_size > (config.hidden_size or 0):
        problems.append(
            f"xlora_size ({config.xlora_size}) must be at most hidden_size ({config.hidden_size}) where xlora_depth "
            f"({config.xlora_depth}) is above 1: mistral.rs takes the one for the other"
        )
    within = [(one, other) for one in names for other in names if one != other and one in other]
    if within:
        problems.append(
            f"experts {within[0][0]!r} and {within[0][1]!r}: mistral.rs finds an expert's files by its name, and "
            f"the one is in the other. Rename them: --rename {within[0][0]}=... {within[0][1]}=..."
        )
    if config.base_model_name_or_path is None:
        problems.append("base is missing: give --base, the name or folder by which the engine will load the base model")
    return problems


def write_mistralrs(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    """Write a mixture to the folder `part`, which will become `target`."""
    names = [adapter.name for adapter in files.adapters]
    for adapter in files.adapters:
        # In one folder, as the engine does not read subfolders.
        shutil.copy(adapter.folder / CONFIG_NAME, part / f"{adapter.name}_config.json")
        save_tensors({**adapter.weights, **adapter.heads}, part / f"{adapter.name}_model.safetensors")
    # The engine applies dropout also in inference, so it is set to 0.
    config = original_config(files) | {"adapters": {name: name for name in names}, "xlora_dropout_p": 0.0}
    gate = original_gate(files, stride=1)
    if files.config.xlora_depth > 1:
        config["xlora_size"] = width = files.config.hidden_size
        gate = _widened(gate, width)
    save_tensors(gate, part / ORIGINAL_GATE)
    write_json(part / ORIGINAL_CONFIG, config)
    ordering = {
        "order": names,
        "layers": {layer: number for number, layer in enumerate(layers)},
        "base_model_id": files.config.base_model_name_or_path,
    }
    write_json(part / ORDERING, ordering)


def _widened(gate: dict[str, Tensor], width: int | None) -> dict[str, Tensor]:
    """The same gate with hidden layers that are as wide as the base model, which is the only width the engine has.

    The new hidden values are ReLU(0) = 0, and the next layer's weights for them are 0.
    """
    assert width is not None
    widened = {}
    for name, tensor in gate.items():
        rows = width if name.startswith("inner.") else tensor.shape[0]
        shape = (rows,) if tensor.dim() == 1 else (rows, width)
        widened[name] = tensor.new_zeros(shape)
        widened[name][tuple(slice(size) for size in tensor.shape)] = tensor
    return widened

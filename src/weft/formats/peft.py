"""Writes the layout of peft's X-LoRA."""

from __future__ import annotations

from pathlib import Path

from peft.utils import CONFIG_NAME, PeftType

from weft.checkpoint.base_place import lasting_name
from weft.checkpoint.manifest import EXPERTS_FOLDER
from weft.checkpoint.xlora_layout import SHARED_OPTIONS
from weft.formats.layout import common_problems, copy_mixture, write_json
from weft.formats.mixture import MixtureFiles


def peft_problems(files: MixtureFiles) -> list[str]:
    """What peft's X-LoRA does not support in a mixture, one sentence each."""
    problems = common_problems(files, "peft's X-LoRA")
    names = list(files.config.adapters or {})
    numbers = [str(number) for number in range(len(names))]
    if names != numbers:
        pairs = " ".join(f"{name}={number}" for name, number in zip(names, numbers, strict=True))
        problems.append(
            f"experts {names} must be named {numbers}, in this order: peft ends in a KeyError with other names. "
            f"Rename them: --rename {pairs}"
        )
    elsewhere = sorted(layer for layer in files.layers if not layer.startswith("model.") or "model.model." in layer)
    if elsewhere:
        problems.append(
            f"layers {elsewhere[:5]} are not below 'model.': peft looks for every expert's tensors there and nowhere "
            "else"
        )
    return problems


def write_peft(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    """Write a mixture to the folder `part`, which will become `target`."""
    copy_mixture(files, part)
    kept = (*SHARED_OPTIONS, "base_model_name_or_path", "task_type", "auto_mapping", "revision")
    values = {name: getattr(files.config, name) for name in kept}
    # peft resolves relative paths in the working directory.
    paths = {a.name: str(target.resolve() / EXPERTS_FOLDER / a.name) for a in files.adapters}
    values["base_model_name_or_path"] = lasting_name(files.config.base_model_name_or_path)
    values |= {"adapters": paths, "peft_type": PeftType.XLORA.value, "inference_mode": True}
    write_json(part / CONFIG_NAME, values)

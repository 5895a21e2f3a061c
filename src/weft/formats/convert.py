"""Writes a saved mixture in another library's layout, with the same logits, or refuses it with all reasons.

Nothing is computed: the gate's tensors and the experts' files are written under other names. So the base model's
weights are not needed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from peft.utils import CONFIG_NAME, TaskType
from torch import nn

from weft.checkpoint.adapters import local_folder
from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG
from weft.config import XLoraConfig
from weft.errors import ConfigError
from weft.files.ownership import refuse_used_folder
from weft.files.reading import read_json
from weft.files.writing import replace_folder
from weft.formats.layout import copy_mixture
from weft.formats.mistralrs import mistralrs_problems, write_mistralrs
from weft.formats.mixture import MixtureFiles, opened
from weft.formats.peft import peft_problems, write_peft
from weft.formats.xlora import write_xlora, xlora_problems
from weft.model.saving import complete_folder

Base = nn.Module | str | os.PathLike[str] | None
# Options of weft that do not change the logits.
TRAINING_OPTIONS = (
    "balance_loss_weight",
    "entropy_loss_weight",
    "expert_label_loss_weight",
    "scalings_log_size",
)


def convert_mixture(
    source: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    base: Base = None,
    adapters: dict[str, str] | None = None,
    rename: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a saved mixture in another layout, with the same logits.

    Args:
        source: folder or Hub id, in the layout of weft, peft, the original xlora library or mistral.rs.
        to: "weft", "peft", "xlora" or "mistralrs".
        output: a new or empty folder.
        base: the base model, its folder or its Hub id, of which only the config is read. For "mistralrs", the name with
            which the engine will load it. None takes the one that the source names.
        adapters: name -> path of the experts, if they are not where the source says.
        rename: old name -> new name of experts.
        trust_remote_code: run code that comes with the base model, if its config is read.

    Returns:
        The output folder.

    Raises:
        ConfigError: the layout does not support the mixture (all reasons at once), or the output is not empty.
        CheckpointError, AdapterError: the source cannot be read.

    Example:
        >>> weft.convert_mixture("lamm-mit/x-lora-gemma-7b", "weft", "x-lora-gemma")
        >>> weft.convert_mixture("my-mixture", "peft", "for-peft", rename={"math": "0", "code": "1"})
    """
    if to not in _FORMATS:
        raise ConfigError(f"to ({to!r}) must be one of {', '.join(_FORMATS)}")
    problems_of, write = _FORMATS[to]
    target = Path(output).expanduser()
    refuse_used_folder(target)
    with opened(source, adapters, rename, base_is_given=base is not None) as files:
        if base is not None and not isinstance(base, nn.Module):
            files.config.base_model_name_or_path = os.fspath(base)
        problems = problems_of(files)
        if problems:
            raise ConfigError(f"{source} cannot be written in the layout of {to}:", problems)
        needed = to in ("weft", "mistralrs")
        layers = files.layers_in_order(base, trust_remote_code=trust_remote_code) if needed else []
        last = CONFIG_NAME if to in ("weft", "peft") else ORIGINAL_CONFIG
        replace_folder(target, lambda part: write(files, layers, part, target), last)
    return target


def left_out(source: str | os.PathLike[str], to: str) -> list[str]:
    """The options of a saved mixture that another layout does not have, and that do not change the logits."""
    file = local_folder(source, "the mixture") / CONFIG_NAME
    if to == "weft" or not os.path.lexists(file):
        return []
    saved, defaults = read_json(file), {field.name: field.default for field in dataclasses.fields(XLoraConfig)}
    return [name for name in TRAINING_OPTIONS if saved.get(name, defaults[name]) != defaults[name]]


def _no_problems(files: MixtureFiles) -> list[str]:
    return []


def _write_weft(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    copy_mixture(files, part)
    config = dataclasses.replace(files.config, layer_names=layers)
    if config.task_type is None and all(a.config.task_type == TaskType.CAUSAL_LM for a in files.adapters):
        config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = True
    complete_folder(config, part)


_Problems = Callable[[MixtureFiles], list[str]]
_Writer = Callable[[MixtureFiles, list[str], Path, Path], None]
_FORMATS: dict[str, tuple[_Problems, _Writer]] = {
    "weft": (_no_problems, _write_weft),
    "peft": (peft_problems, write_peft),
    "xlora": (xlora_problems, write_xlora),
    "mistralrs": (mistralrs_problems, write_mistralrs),
}

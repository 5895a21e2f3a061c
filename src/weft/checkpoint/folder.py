"""The self-contained folder: gate, experts and options of one mixture.

    adapter_config.json           the options (peft's X-LoRA config): names and layers in order, relative paths
    adapter_model.safetensors     gate and heads, under peft's keys (and copies of trained experts, for tools to resume)
    weft_manifest.json            digests of all tensors, and of the experts' configs
    experts/math/                 each expert, an ordinary peft adapter: adapter_config.json, adapter_model.safetensors

The experts lie one level down because transformers' Trainer takes adapters right below a checkpoint for further
adapters of the same model, and fails to resume. Folders that peft's X-LoRA wrote are read too: they have no manifest,
and their experts lie wherever their config says. So are those of the original xlora library (`xlora_layout.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from weft.checkpoint.adapter_keys import without_wrappers
from weft.checkpoint.adapters import local_folder
from weft.checkpoint.manifest import EXPERTS_FOLDER, FORMAT_VERSION, MANIFEST_NAME, verify
from weft.checkpoint.xlora_layout import (
    ORIGINAL_CONFIG,
    ORIGINAL_GATE,
    is_original,
    original_base,
    original_options,
    read_original_gate,
)
from weft.errors import CheckpointError, ConfigError
from weft.files.names import name_problems
from weft.files.reading import JsonTable, kind_shown, read_json, shown
from weft.files.tensors import read_tensors
from weft.files.writing import replace_file, settle

GATE_KEY = "internal_xlora_classifier."
# In the names of an expert's parameters.
_EXPERT_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")


@dataclass(frozen=True)
class SavedOptions:
    """The options that a folder holds, as values.

    Args:
        folder: where they lie.
        file: that holds them, for messages.
        gate_file: with the gate's tensors.
        values: by the names of `XLoraConfig`; the adapters' paths are those of their folders.
    """

    folder: Path
    file: Path
    gate_file: Path
    values: dict[str, Any]


def read_options(path: str | os.PathLike[str], subfolder: str | None, adapters: dict[str, str] | None) -> SavedOptions:
    """Read and verify a saved folder.

    Args:
        path: the folder, or Hub id.
        subfolder: of it; None for none.
        adapters: where the experts are, if not where the folder says.

    Raises:
        CheckpointError: a file is missing or was altered after it was saved, or of a newer weft.
    """
    folder = local_folder(path, "the X-LoRA model")
    if subfolder:
        folder = folder / subfolder
        settle(folder)
    if is_original(folder):
        file = folder / ORIGINAL_CONFIG
        return SavedOptions(folder, file, folder / ORIGINAL_GATE, original_options(folder, adapters))
    file = folder / CONFIG_NAME
    values = read_json(file)
    if values.get("peft_type") != "XLORA":
        raise CheckpointError(f"{file} is of type {kind_shown(values.get('peft_type'))}, expected XLORA")
    version = values.get("format_version")
    if version is not None and version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{file}: format_version ({shown(version)}) must be at most {FORMAT_VERSION}: upgrade weft"
        )
    if version is not None or os.path.lexists(folder / MANIFEST_NAME):
        verify(folder, values, with_experts=adapters is None)
    else:
        values.setdefault("layerwise_scalings", False)  # peft's default
    values["adapters"] = adapters if adapters is not None else _saved_adapters(folder, values)
    return SavedOptions(folder, file, folder / SAFETENSORS_WEIGHTS_NAME, values)


def _saved_adapters(folder: Path, values: JsonTable) -> dict[str, str]:
    """The adapters' paths as the folder names them."""
    table = values.table("adapters", None)
    problems = name_problems(table or ())  # before they are used as folders
    if problems:
        raise ConfigError(f"{folder / CONFIG_NAME} cannot be read:", problems)
    return {name: _resolve(folder, name, table.string(name)) for name in table or ()}


def _resolve(folder: Path, name: str, path: str) -> str:
    """An adapter's saved path: inside the folder where it is relative and there, else as it stands.

    One that is gone may have been inside of a folder that was moved.
    """
    inside = folder / path
    if not os.path.isabs(path):
        return str(inside) if os.path.isdir(inside) else path
    moved = folder / EXPERTS_FOLDER / name
    return str(moved) if not os.path.isdir(path) and os.path.isdir(moved) else path


def read_gate(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved gate (and what is saved beside it), under the names that peft saves them by.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    if is_original(folder):
        return read_original_gate(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not os.path.lexists(file) and os.path.lexists(folder / "adapter_model.bin"):
        raise CheckpointError(
            f"{folder} holds the gate as a pickle (adapter_model.bin), which weft does not open: save it again with "
            "peft's safe_serialization=True"
        )
    return {without_wrappers(key): value for key, value in read_tensors(file).items()}


def saved_base(folder: Path) -> str | None:
    """The base model that a saved mixture names.

    Raises:
        CheckpointError: the folder is no mixture's.
    """
    if is_original(folder):
        return original_base(folder)
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != "XLORA":
        raise CheckpointError(
            f"model ({folder}) is of type {kind_shown(config.get('peft_type'))}, expected XLORA: a trained mixture"
        )
    return config.string("base_model_name_or_path", None) or None


def write_options(folder: Path, text: str) -> None:
    """Write a folder's options, the JSON of `XLoraConfig`."""
    replace_file(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def is_expert_key(key: str) -> bool:
    """Whether a parameter of this name belongs to an expert."""
    return expert_of_key(key) is not None


def expert_of_key(key: str) -> str | None:
    """The name of the expert that a parameter of this name belongs to; None where it is no expert's."""
    return next((key.rpartition(part)[2].partition(".")[0] for part in _EXPERT_PARTS if part in key), None)

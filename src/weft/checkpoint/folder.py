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
from weft.checkpoint.manifest import EXPERTS_FOLDER, FORMAT_VERSION, MANIFEST_NAME, Keep, verify
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
from weft.files.tensors import Opened, read_tensors, taken
from weft.files.writing import replace_file, settle

GATE_KEY = "internal_xlora_classifier."
# In the names of an expert's parameters.
_EXPERT_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")


@dataclass(frozen=True)
class SavedMixture:
    """A saved mixture's folder, opened and verified.

    Args:
        folder: where it lies.
        file: that holds its options.
        gate_file: that holds its gate.
        values: its options by the names of `XLoraConfig`; the adapters' paths are those of their folders.
        tensors: what has been read, by file: the gate and, where there is a manifest and nobody has said otherwise, the
            experts; whoever uses a file's tensors takes them out. Of copies of experts beside the gate there are names
            and shapes alone.
    """

    folder: Path
    file: Path
    gate_file: Path
    values: dict[str, Any]
    tensors: Opened

    def gate(self) -> dict[str, Tensor]:
        """The gate's tensors (and what is saved beside it), under the names that peft saves them by; taken out.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        if self.gate_file.name == ORIGINAL_GATE:
            return read_original_gate(self.folder, self.tensors)
        if not os.path.lexists(self.gate_file) and os.path.lexists(self.folder / "adapter_model.bin"):
            raise CheckpointError(
                f"{self.folder} holds the gate as a pickle (adapter_model.bin), which weft does not open: save it "
                "again with peft's safe_serialization=True"
            )
        return {without_wrappers(key): value for key, value in taken(self.gate_file, self.tensors).items()}


def open_mixture(
    path: str | os.PathLike[str],
    subfolder: str | None = None,
    adapters: dict[str, str] | None = None,
    *,
    keep_experts: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> SavedMixture:
    """Open a saved folder: its tensors are read once, verified, and kept for whoever builds something with them.

    Args:
        path: the folder, or Hub id.
        subfolder: of it; None for none.
        adapters: where the experts are, if not where the folder says.
        keep_experts: False for the options and the gate alone, so that no more than one expert is held at a time.
        revision: branch, tag or commit on the Hub; None takes the main branch.
        token: for the Hub; None takes the one of the machine, if it has one.

    Raises:
        CheckpointError: a file is missing or was altered after it was saved, or of a newer weft.
    """
    folder = local_folder(path, "the X-LoRA model", revision=revision, token=token)
    if subfolder:
        folder = folder / subfolder
        settle(folder)
    tensors: Opened = {}

    def keep(file: Path, read: dict[str, Tensor]) -> None:
        if file == gate_file:
            tensors[file] = _without_copies(read)
        elif keep_experts:
            tensors[file] = read

    if is_original(folder):
        file, gate_file = folder / ORIGINAL_CONFIG, folder / ORIGINAL_GATE
        values = original_options(folder, adapters)
    else:
        file, gate_file = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
        values = _options(folder, file, adapters, keep)
    if gate_file not in tensors and os.path.isfile(gate_file):
        keep(gate_file, read_tensors(gate_file))
    return SavedMixture(folder, file, gate_file, values, tensors)


def _options(folder: Path, file: Path, adapters: dict[str, str] | None, keep: Keep) -> dict[str, Any]:
    """The options in weft's layout or peft's; where there is a manifest, all is verified."""
    values = read_json(file)
    if values.get("peft_type") != "XLORA":
        raise CheckpointError(f"{file} is of type {kind_shown(values.get('peft_type'))}, expected XLORA")
    version = values.get("format_version")
    if version is not None and version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{file}: format_version ({shown(version)}) must be at most {FORMAT_VERSION}: upgrade weft"
        )
    if version is not None or os.path.lexists(folder / MANIFEST_NAME):
        verify(folder, values, with_experts=adapters is None, keep=keep)
    else:
        values.setdefault("layerwise_scalings", False)  # peft's default
    values["adapters"] = adapters if adapters is not None else _saved_adapters(folder, values)
    return values


def _without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gate's tensors, and of the copies of trained experts beside them names and shapes: these have own files."""
    if not any(map(is_expert_key, tensors)):
        return tensors
    return {key: value.to("meta") if is_expert_key(key) else value.clone() for key, value in tensors.items()}


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

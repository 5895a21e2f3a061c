"""The folder of a saved mixture, with gate, experts and options.

    adapter_config.json           the options (peft's X-LoRA config): experts and layers in order, relative paths
    adapter_model.safetensors     gate and heads under peft's keys, and copies of trained experts for tools that resume
    weft_manifest.json            digests of all tensors, and of the experts' configs
    experts/math/                 each expert, an ordinary peft adapter: adapter_config.json, adapter_model.safetensors

The experts are one level down because transformers' Trainer would take adapter folders directly in a checkpoint for
further adapters of the same model, and fail to resume. Two other layouts are read too: folders of peft's X-LoRA, which
have no manifest, and whose experts are where the config says; and those of the original library (`xlora_layout.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from weft.checkpoint.adapter_keys import without_wrappers
from weft.checkpoint.adapters import is_base_model, local_folder
from weft.checkpoint.base_place import found_base
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
_SHOWN = 5  # names in one message
# Parts of the names of experts' parameters.
_EXPERT_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")


@dataclass(frozen=True)
class SavedMixture:
    """A saved mixture's folder, opened and verified.

    Args:
        folder: the folder.
        file: the file of its options.
        gate_file: the file of its gate.
        values: the options, by the fields of `XLoraConfig`; `adapters` has the paths of the experts' folders, and
            `base_model_name_or_path` the place at which the base model was found.
        tensors: file -> tensors that were read: the gate, and the experts if there is a manifest and `open_mixture` was
            called with `keep_experts`. Users remove what they take. Copies of experts in the gate's file are on the
            meta device.
    """

    folder: Path
    file: Path
    gate_file: Path
    values: dict[str, Any]
    tensors: Opened

    def gate(self) -> dict[str, Tensor]:
        """Take the tensors of the gate's file out of `tensors`, under peft's keys.

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
    """Open a saved folder. Its tensors are read once, verified, and kept in the result.

    Args:
        path: folder or Hub id.
        subfolder: the mixture's folder in it; None if it is the folder itself.
        adapters: name -> path of the experts, if they are not where the folder says.
        keep_experts: False keeps only the gate's tensors, so that at most one expert is in memory at a time.
        revision: branch, tag or commit on the Hub; None takes the main branch.
        token: token for the Hub; None takes the machine's token, if there is one.

    Raises:
        CheckpointError: a file is missing, was changed after it was saved, or comes from a newer version of weft.
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
    values["base_model_name_or_path"] = found_base(folder, values.get("base_model_name_or_path"))
    if gate_file not in tensors and os.path.isfile(gate_file):
        keep(gate_file, read_tensors(gate_file))
    return SavedMixture(folder, file, gate_file, values, tensors)


def _options(folder: Path, file: Path, adapters: dict[str, str] | None, keep: Keep) -> dict[str, Any]:
    """The options in weft's or peft's layout. If there is a manifest, all files are verified."""
    values = _own_options(folder)
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
    """A gate's tensors. Copies of trained experts become meta tensors, as the experts have their own files."""
    if not any(map(is_expert_key, tensors)):
        return tensors
    return {key: value.to("meta") if is_expert_key(key) else value.clone() for key, value in tensors.items()}


def _saved_adapters(folder: Path, values: JsonTable) -> dict[str, str]:
    """name -> path of the experts, from the folder's options."""
    table = values.table("adapters", None)
    problems = name_problems(table or ())  # before they are used as folders
    if problems:
        raise ConfigError(f"{folder / CONFIG_NAME} cannot be read:", problems)
    return {name: _resolve(folder, name, table.string(name)) for name in table or ()}


def _resolve(folder: Path, name: str, path: str) -> str:
    """An expert's path: a relative path is taken in the folder if it exists there, else it is left unchanged.

    If an absolute path does not exist, because the mixture was moved, the expert in the folder is taken.
    """
    inside = folder / path
    if not os.path.isabs(path):
        return str(inside) if os.path.isdir(inside) else path
    moved = folder / EXPERTS_FOLDER / name
    return str(moved) if not os.path.isdir(path) and os.path.isdir(moved) else path


def saved_base(folder: Path) -> str | None:
    """The path or Hub id of a saved mixture's base model, where it was found; None if the folder does not name it.

    Raises:
        CheckpointError: the folder is not a mixture.
    """
    if is_original(folder):
        return found_base(folder, original_base(folder))
    return found_base(folder, _own_options(folder).string("base_model_name_or_path", None)) or None


def _own_options(folder: Path) -> JsonTable:
    """The options as the folder has them.

    Raises:
        CheckpointError: the folder is not a mixture; the message says what it is.
    """
    if is_base_model(folder):
        raise CheckpointError(
            f"{folder} is a base model, not a mixture: weft train --base {folder} --adapters NAME=FOLDER ... makes one"
        )
    if os.path.isdir(folder) and not os.path.lexists(folder / CONFIG_NAME):
        raise CheckpointError(f"{folder / CONFIG_NAME} is missing, so this is no mixture: {_what_is_there(folder)}")
    values = read_json(folder / CONFIG_NAME)
    kind = values.get("peft_type")
    wrong = f"{folder / CONFIG_NAME} is of type {kind_shown(kind)}, expected XLORA"
    if kind == "LORA":
        raise CheckpointError(
            f"{folder} is one adapter, not a mixture: weft train --base MODEL --adapters NAME={folder} NAME=FOLDER ... "
            f"makes one of several ({wrong})"
        )
    if kind != "XLORA":
        raise CheckpointError(f"{wrong}: a trained mixture")
    return values


def _what_is_there(folder: Path) -> str:
    """What a folder without options has instead, and what to do."""
    names = sorted(os.listdir(folder))
    steps = [path for parent in (folder, folder / "checkpoints") for path in parent.glob("checkpoint-*")]
    whole = [path for path in steps if os.path.isfile(path / CONFIG_NAME)]
    if whole:
        last = max(whole, key=lambda path: (len(path.name), path.name))  # the highest number
        return f"it holds the checkpoints of a run, which --resume true continues; {last} is a mixture"
    adapters = [name for name in names if os.path.isfile(folder / name / CONFIG_NAME)]
    if adapters:
        return f"it holds the folders of adapters or mixtures ({', '.join(adapters[:_SHOWN])}): give the mixture's"
    return f"it holds {', '.join(names[:_SHOWN])}" if names else "it is empty"


def write_options(folder: Path, text: str) -> None:
    """Write a folder's options; `text` is the JSON of an `XLoraConfig`."""
    replace_file(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def is_expert_key(key: str) -> bool:
    """Whether a parameter of this name belongs to an expert."""
    return expert_of_key(key) is not None


def expert_of_key(key: str) -> str | None:
    """The expert to which a parameter of this name belongs; None if it belongs to none."""
    return next((key.rpartition(part)[2].partition(".")[0] for part in _EXPERT_PARTS if part in key), None)

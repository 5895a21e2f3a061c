"""Shared by the writers of other libraries' layouts: what none of them supports, and the files of an expert."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, TaskType
from safetensors.torch import save_file
from torch import Tensor

from weft.checkpoint.adapter_keys import KEY_PREFIX, brought_keys
from weft.checkpoint.adapters import Adapter
from weft.checkpoint.licenses import CARD, licensed_card
from weft.checkpoint.manifest import EXPERTS_FOLDER, MANIFEST_NAME
from weft.checkpoint.mistralrs_layout import ORDERING
from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG, ORIGINAL_GATE
from weft.files.reading import own_files
from weft.files.tensors import preview
from weft.formats.mixture import MixtureFiles

_LAYOUT_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MANIFEST_NAME, ORIGINAL_CONFIG, ORIGINAL_GATE, ORDERING}
_COMPANIONS = {".json", ".jinja", ".model", ".txt"}  # tokenizers and similar files; no pickles


def common_problems(files: MixtureFiles, library: str) -> list[str]:
    """What only weft supports, one sentence each."""
    config, problems = files.config, []
    for name in ("gate_layer", "scaling_pass_layers", "scaling_pass_rank", "heads"):
        if getattr(config, name) is not None:
            problems.append(f"{name} ({getattr(config, name)!r}) is unknown to {library}: train with it left out")
    dora = [adapter.name for adapter in files.adapters if adapter.config.use_dora]
    if dora:
        problems.append(f"experts {dora} have use_dora, which {library} cannot mix: train them without")
    brought = {adapter.name: keys for adapter in files.adapters if (keys := brought_keys(adapter.weights))}
    if brought:
        problems.append(
            f"experts {list(brought)} contain weights of the base model ({preview(next(iter(brought.values())))}), "
            f"which {library} does not support: save a base model with these weights, and train on that"
        )
    if config.task_type == TaskType.SEQ_2_SEQ_LM:
        problems.append(f"task_type ({config.task_type}): {library} cannot mix experts of an encoder-decoder")
    convolutions = layers_where(files, lambda key, value: value.dim() == 4)
    if convolutions:
        problems.append(f"layers {convolutions[:5]} are convolutions, whose experts {library} cannot mix")
    return problems


def layers_where(files: MixtureFiles, condition: Callable[[str, Tensor], bool]) -> list[str]:
    """The LoRA layers in which an expert has a tensor (key, value) with this condition."""
    found = {
        key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]
        for adapter in files.adapters
        for key, value in adapter.weights.items()
        if ".lora_" in key and condition(key, value)
    }
    return sorted(found)


def copy_expert(adapter: Adapter, folder: Path) -> None:
    """Write an expert as an ordinary adapter, with its card if that declares a licence."""
    folder.mkdir(parents=True)
    shutil.copy(adapter.folder / CONFIG_NAME, folder / CONFIG_NAME)
    save_tensors({**adapter.weights, **adapter.heads}, folder / SAFETENSORS_WEIGHTS_NAME)
    if licensed_card(adapter.folder) is not None and adapter.folder / CARD in own_files(adapter.folder):
        shutil.copy(adapter.folder / CARD, folder / CARD)


def copy_mixture(files: MixtureFiles, part: Path) -> None:
    """Write the experts and the gate in the layout of weft and peft, and copy the tokenizer and similar files."""
    for adapter in files.adapters:
        copy_expert(adapter, part / EXPERTS_FOLDER / adapter.name)
    _copy_companions(files.folder, part)
    save_tensors(files.tensors, part / SAFETENSORS_WEIGHTS_NAME)


def _copy_companions(source: Path, part: Path) -> None:
    for file in own_files(source):
        if file.suffix in _COMPANIONS and file.name not in {*_LAYOUT_FILES, "trainer_state.json"}:
            shutil.copy(file, part / file.name)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as a safetensors file."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def write_json(file: Path, values: dict[str, Any]) -> None:
    """Write a dict as a JSON file."""
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")

"""The layout of mistral.rs: the original xlora library's in a single folder, with a file that numbers the LoRA layers.

xlora_config.json                           the options
xlora_classifier.safetensors                the gate
ordering.json                               the experts and the LoRA layers in the order of the gate's outputs
NAME_config.json, NAME_model.safetensors    each expert
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG, ORIGINAL_GATE, is_original
from weft.errors import CheckpointError, WeftError, bullet_list
from weft.files.names import name_problems
from weft.files.reading import read_bytes, read_json, shown
from weft.files.tensors import read_tensors
from weft.files.writing import temporary_folder

ORDERING = "ordering.json"
_INNER = re.compile(r"inner\.(\d{1,9})\.(weight|bias)")


def is_flat(folder: Path) -> bool:
    """Whether a folder is in mistral.rs's layout, with NAME_config.json and NAME_model.safetensors side by side."""
    if not is_original(folder) or not os.path.isfile(folder / ORDERING):
        return False
    names = _order(folder)
    return bool(names) and all(os.path.isfile(folder / f"{name}_config.json") for name in names)


@contextlib.contextmanager
def unfolded(flat: Path) -> Iterator[tuple[Path, list[str] | None]]:
    """(the mixture in the original library's layout, its LoRA layers in the order of the gate's outputs).

    The folder exists only in the block. Errors in the block name the files of the flat folder. The layers are None if
    the flat folder does not name them.

    Raises:
        CheckpointError: a file is missing or broken.
    """
    layer_names = _layers_in_order(flat)
    with temporary_folder(lambda part: _unfold(flat, part)) as folder, _errors_in_flat_names(flat, folder):
        yield folder, layer_names


def _layers_in_order(flat: Path) -> list[str] | None:
    """A flat folder's layers in the order of the gate's outputs; None if it does not name them."""
    table = read_json(flat / ORDERING).table("layers", None)
    layers = {layer: table.whole(layer) for layer in table or {}}
    if sorted(layers.values()) != list(range(len(layers))):
        raise CheckpointError(
            f"{flat / ORDERING}: layers ({shown(layers)}) must number the LoRA layers from 0 to {len(layers) - 1}"
        )
    if "" in layers:
        raise CheckpointError(f"{flat / ORDERING}: layers ({shown(layers)}) must be names, but one is empty")
    return sorted(layers, key=lambda layer: layers[layer]) or None


def _order(flat: Path) -> list[str]:
    """The experts' names in a flat folder's order.

    Raises:
        CheckpointError: an expert cannot have such a name.
    """
    ordering = read_json(flat / ORDERING)
    names = ordering.strings("order", None) or []
    problems = name_problems(names)  # before they are used as folders
    if len({name.lower() for name in names}) < len(names):
        problems.append(f"order ({shown(names)}) must have names that differ in more than upper and lower case")
    if problems:
        raise CheckpointError(f"{flat / ORDERING} cannot be read:{bullet_list(problems)}")
    return names


def _unfold(flat: Path, folder: Path) -> None:
    """Read and check a flat folder, then write it in the original library's layout."""
    names = _order(flat)
    config = read_json(flat / ORIGINAL_CONFIG) | {"adapters": names}
    # mistral.rs numbers the gate's linear layers only; the original library also counts ReLU and dropout.
    stride = 3 if config.get("enable_relu_and_dropout") else 1
    tensors = {}
    for key, value in read_tensors(flat / ORIGINAL_GATE).items():
        inner = _INNER.fullmatch(key)
        tensors[f"inner.{int(inner[1]) * stride}.{inner[2]}" if inner else key] = value
    files = {Path(ORIGINAL_CONFIG): json.dumps(config).encode()}
    for name in names:
        files[Path(name, CONFIG_NAME)] = read_bytes(flat / f"{name}_config.json")
        files[Path(name, SAFETENSORS_WEIGHTS_NAME)] = read_bytes(flat / f"{name}_model.safetensors", most=None)
    save_file(tensors, folder / ORIGINAL_GATE)
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(content)


@contextlib.contextmanager
def _errors_in_flat_names(flat: Path, folder: Path) -> Iterator[None]:
    """Replace the names of the temporary files in errors by those of the flat folder's files."""
    try:
        yield
    except WeftError as err:
        text = str(err)
        for name in _order(flat):
            text = text.replace(f"{folder / name / CONFIG_NAME}", f"{flat / name}_config.json")
            text = text.replace(f"{folder / name / SAFETENSORS_WEIGHTS_NAME}", f"{flat / name}_model.safetensors")
        raise type(err)(text.replace(str(folder), str(flat))) from err

"""The manifest of a saved folder, with which files that were lost or changed later are found on load.

It holds the experts and layers in the order of the gate's outputs, a digest of each expert's options, and a digest of
each tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import CheckpointError, ConfigError, bullet_list
from weft.files.names import name_problems
from weft.files.ownership import SHOWN
from weft.files.reading import JsonTable, naming_problem, path_shown, read_json, shown
from weft.files.tensors import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, read_tensors

MANIFEST_NAME = "weft_manifest.json"
EXPERTS_FOLDER = "experts"
FORMAT_VERSION = 1
_ORDERS = ("expert_names", "layer_names")
Keep = Callable[[Path, dict[str, Tensor]], None]
_ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)


def manifest_of(folder: Path, expert_names: list[str], layer_names: list[str]) -> dict[str, Any]:
    """Make the manifest of the folder's present files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    tensors = {file: _tensor_digests(folder / file) for file in _tensor_files(expert_names)}
    options = {file: options_digest(read_json(folder / file)) for file in _option_files(expert_names)}
    return {
        "format_version": FORMAT_VERSION,
        "expert_names": expert_names,
        "layer_names": layer_names,
        "options": options,
        "tensors": tensors,
    }


def refuse_strangers_folder(folder: Path, what: str = "save_directory") -> None:
    """Raise if saving a mixture would replace files that are not part of a mixture.

    Raises:
        ConfigError: the folder holds an adapter, or other files with the names of a mixture's files.
    """
    problem = naming_problem(folder)
    if problem is not None:
        raise ConfigError(f"{what} ({path_shown(folder)}) cannot be made: {problem}")
    if os.path.isfile(folder):
        raise ConfigError(f"{what} ({folder}) is a file, expected a folder: give another one")
    there = [name for name in (*_ADAPTER_FILES, MANIFEST_NAME, EXPERTS_FOLDER) if os.path.lexists(folder / name)]
    if not there:
        return
    kind: Any = None
    expert_names: Any = None
    with suppress(CheckpointError):
        kind = read_json(folder / CONFIG_NAME).get("peft_type")
        expert_names = read_json(folder / MANIFEST_NAME).get("expert_names")
    if kind != "XLORA":
        raise ConfigError(
            f"{what} ({folder}) holds {', '.join(there)} without a mixture, which would be replaced: give another "
            "folder, or move them away"
        )
    if EXPERTS_FOLDER in there:
        strangers = sorted({entry.name for entry in (folder / EXPERTS_FOLDER).iterdir()} - {*(expert_names or [])})
        if strangers:
            raise ConfigError(
                f"{what} ({folder / EXPERTS_FOLDER}) holds {', '.join(strangers[:SHOWN])}, which no mixture was saved "
                "with and which would be lost: give another folder, or move it away"
            )


def verify(folder: Path, config: JsonTable, *, with_experts: bool = True, keep: Keep | None = None) -> None:
    """Compare a saved folder with its manifest.

    Args:
        folder: the saved folder.
        config: the content of its `adapter_config.json`.
        with_experts: also compare the experts; False if they are loaded from elsewhere.
        keep: called with each file and its tensors, so that they need not be read a second time.

    Raises:
        CheckpointError: files or tensors are missing, unexpected or changed; all of them at once.
    """
    manifest = _read_manifest(folder / MANIFEST_NAME)
    problems = [
        f"{CONFIG_NAME}: {name} is not in the order in which the gate was saved"
        for name in _ORDERS
        if config.get(name) != manifest[name]
    ]
    expert_names = manifest["expert_names"] if with_experts else []
    paths = config.table("adapters", None) or {}
    problems += [
        f"{CONFIG_NAME}: adapters has {shown(paths.get(name))} for {name!r}, expected '{EXPERTS_FOLDER}/{name}'"
        for name in expert_names
        if paths.get(name) != f"{EXPERTS_FOLDER}/{name}"
    ]
    for file in _tensor_files(expert_names):
        try:
            problems += [
                f"{file}: {problem}"
                for problem in _tensor_problems(manifest["tensors"].get(file, {}), _tensor_digests(folder / file, keep))
            ]
        except CheckpointError as err:
            problems.append(str(err))
    for file in _option_files(expert_names):
        try:
            if options_digest(read_json(folder / file)) != manifest["options"].get(file):
                problems.append(f"{file} was changed after it was saved")
        except CheckpointError as err:
            problems.append(str(err))
    if problems:
        raise CheckpointError(f"{folder} is not as it was saved:{bullet_list(problems)}")


def _read_manifest(file: Path) -> JsonTable:
    """Read the manifest and check the types of all values."""
    manifest = read_json(file)
    lacking = sorted({*_ORDERS, "options", "tensors"} - manifest.keys())
    if lacking:
        raise CheckpointError(f"{file} lacks {', '.join(lacking)}: copy it again")
    for name in _ORDERS:
        manifest.strings(name)
    problems = name_problems(manifest["expert_names"])  # before they are used as folders
    if problems:
        raise CheckpointError(f"{file} cannot be read:{bullet_list(problems)}")
    tensors, options = manifest.table("tensors"), manifest.table("options")
    for name in options:
        options.string(name)
    for name in tensors:
        digests = tensors.table(name)
        for key in digests:
            digests.string(key)
    return manifest


def _tensor_files(expert_names: list[str]) -> list[str]:
    own = [f"{EXPERTS_FOLDER}/{name}/{SAFETENSORS_WEIGHTS_NAME}" for name in expert_names]
    return [SAFETENSORS_WEIGHTS_NAME, *own]


def _option_files(expert_names: list[str]) -> list[str]:
    return [f"{EXPERTS_FOLDER}/{name}/{CONFIG_NAME}" for name in expert_names]


def options_digest(values: dict[str, Any]) -> str:
    """The digest of an expert's `adapter_config.json`, independent of its formatting."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def _tensor_digests(file: Path, keep: Keep | None = None) -> dict[str, str]:
    tensors = read_tensors(file)
    if keep is not None:
        keep(file, tensors)
    return {key: _digest(tensor) for key, tensor in sorted(tensors.items())}


def _digest(tensor: Tensor) -> str:
    header = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.blake2b(header + data.tobytes(), digest_size=16).hexdigest()


def _tensor_problems(saved: dict[str, str], present: dict[str, str]) -> list[str]:
    groups = {
        "missing keys": sorted(saved.keys() - present.keys()),
        "unexpected keys": sorted(present.keys() - saved.keys()),
        "changed tensors": sorted(key for key in saved.keys() & present.keys() if saved[key] != present[key]),
    }
    return [f"{what} ({len(keys)}): {', '.join(keys[:8])}" for what, keys in groups.items() if keys]

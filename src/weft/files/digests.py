"""Sizes and digests of saved files, to find files that were changed or lost later."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from weft.errors import first_line

_WEIGHTS = {".safetensors", ".bin", ".gguf"}
_SAMPLE = 2**22  # bytes at each end of a file


def digest_of_file(file: Path) -> dict[str, Any]:
    """The record of a file: its size in bytes and a digest of its content."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return {"bytes": file.stat().st_size, "digest": digest}


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's or adapter's weights."""
    return sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS and file.is_file())


def digest_of_weights(folder: Path) -> str | None:
    """A digest of a model's or adapter's weights, as far as the beginnings and ends of its files tell them apart.

    Returns:
        It; None where the folder has no weights that are known as such.
    """
    files = weight_files(folder)
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            digest.update(opened.read(_SAMPLE))
            opened.seek(max(_SAMPLE, size - _SAMPLE))
            digest.update(opened.read())
    return digest.hexdigest() if files else None


def digests(folder: Path, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records of files in a folder, by their relative names."""
    return {name: digest_of_file(folder / name) for name in sorted(files)}


def changes(folder: Path, recorded: Any) -> list[str]:
    """How the files of a folder differ from their records, one phrase per file. The size is compared first.

    Args:
        folder: the folder; files without a record are ignored.
        recorded: the result of `digests`, read back from a file; it may be malformed.
    """
    if not isinstance(recorded, dict) or not all(isinstance(values, dict) for values in recorded.values()):
        return ["its digests are garbled"]
    problems = []
    for name, values in recorded.items():
        file = folder / name
        try:
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != values.get("bytes") or digest_of_file(file) != values:
                problems.append(f"{name} was changed after it was saved")
        except (OSError, ValueError) as err:
            problems.append(f"{name} cannot be read ({first_line(err)})")
    return problems

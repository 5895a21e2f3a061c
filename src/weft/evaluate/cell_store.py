"""Finished cells of the table, kept beside it, so that a stopped evaluation goes on and a repeated one is quick.

A cell is found again by a digest of all that it depends on: base, experts or mixture, data and options. What has
changed has another digest, and is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from weft.checkpoint.adapters import local_folder
from weft.errors import CheckpointError, ConfigError
from weft.files.reading import is_number, parse_json, read_bytes, reason
from weft.files.writing import check_file, errors_of_writing

_SAMPLED = 64  # values of each of the base's parameters


@dataclass(frozen=True)
class Cell:
    """What one row gave on one data set.

    Attributes:
        scores: of each part, what is summed up and how much it counts.
        seconds: how long it took.
        peak_mb: memory at the peak; None where it cannot be told.
        note: what was chosen on the way, such as a merge's weights.
    """

    scores: list[tuple[float, float]]
    seconds: float
    peak_mb: float | None
    note: str = ""


class CellStore:
    """Cells in a file of JSON lines; without a file they are only remembered.

    Args:
        file: is added to; lines that are not whole, after a process that was killed, are passed over.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._known: dict[str, Cell] = {}
        self._broken = False  # whether the last line ends half-way
        if file is not None and os.path.lexists(file):
            data = read_bytes(file, most=None)
            self._broken = bool(data) and not data.endswith(b"\n")
            for line in data.split(b"\n"):
                try:
                    values = parse_json(line.decode("utf-8"))
                    self._known[values["digest"]] = _cell(**values["cell"])
                except (ValueError, KeyError, TypeError):
                    continue

    @staticmethod
    def check(file: Path) -> None:
        """Raise where a file could not be added to, before anything is measured.

        Raises:
            ConfigError: it is not writable.
        """
        if not os.path.lexists(file):
            check_file(file, "output")
            return
        try:
            file.open("ab").close()
        except OSError as err:
            raise ConfigError(
                f"output: {file}, where its cells are kept, cannot be added to: {err.strerror}; move it away, or give "
                "another output"
            ) from err

    def __contains__(self, digest: str) -> bool:
        return digest in self._known

    def __getitem__(self, digest: str) -> Cell:
        return self._known[digest]

    def keep(self, digest: str, row: str, data: str, cell: Cell) -> None:
        """Remember a cell, and write it down at once.

        Raises:
            CheckpointError: it cannot be written; what was kept before is.
        """
        self._known[digest] = cell
        if self.file is not None:
            line = json.dumps({"digest": digest, "row": row, "data": data, "cell": asdict(cell)})
            kept, advice = "what was measured before is kept in it", "free some space, and the same command goes on"
            with errors_of_writing(self.file, kept, advice), self.file.open("a", encoding="utf-8") as out:
                out.write(("\n" if self._broken else "") + line + "\n")
            self._broken = False


def _cell(scores: Any, seconds: Any, peak_mb: Any, note: Any = "") -> Cell:
    """A cell from what a line holds.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(note, str):
        raise TypeError("a text is expected")
    pairs = [(_measured(value), _measured(weight)) for value, weight in scores]
    return Cell(pairs, _measured(seconds), None if peak_mb is None else _measured(peak_mb), note)


def _measured(value: Any) -> float:
    if not is_number(value) and not isinstance(value, float):  # NaN too, where the model gave it
        raise TypeError("a number is expected")
    return float(value)


def digest_of(*parts: Any) -> str:
    """One digest of several things that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_digest(path: str) -> str:
    """Of all options and tensors of a mixture or an adapter."""
    folder, digest = local_folder(path, "model"), hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".json", ".safetensors") and "checkpoints" not in file.relative_to(folder).parts:
            digest.update(str(file.relative_to(folder)).encode())
            try:
                with file.open("rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            except OSError as err:
                raise CheckpointError(f"{file} cannot be read: {reason(err)}") from err
    return digest.hexdigest()


@torch.no_grad()
def base_digest(base: Any) -> str:
    """Of a base model in memory: its options, and some values of every parameter, as reading all would take long."""
    options = {name: value for name, value in base.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, parameter in sorted(base.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu()
            digest.update(str(some.tolist()).encode())
    return digest.hexdigest()

"""Finished cells of the table, stored beside it, so that an evaluation can be resumed or quickly repeated.

A cell is stored by a digest of everything that it depends on: base model, experts or mixture, data and options. After a
change the digest is another one, and the cell is measured again.
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
from weft.files.failures import errors_of_writing
from weft.files.reading import is_number, parse_json, read_bytes, reason
from weft.files.writing import check_file

_SAMPLED = 64  # values of each of the base's parameters


@dataclass(frozen=True)
class Cell:
    """The result of one row on one data set.

    Attributes:
        scores: for each part of the examples, (sum, weight): see `Scores`.
        seconds: time of the measurement.
        peak_mb: peak memory in MB; None if it cannot be measured.
        note: a choice that was made, such as a merge's weights.
    """

    scores: list[tuple[float, float]]
    seconds: float
    peak_mb: float | None
    note: str = ""


class CellStore:
    """Stores cells in a file of JSON lines, or only in memory.

    Args:
        file: the file, to which cells are appended; None for memory only. Incomplete lines from a killed process are
            ignored.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._known: dict[str, Cell] = {}
        self._broken = False  # whether the last line is incomplete
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
        """Raise if a file cannot be written. To be called before anything is measured.

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
        """Store a cell, and write it to the file immediately.

        Raises:
            CheckpointError: it cannot be written; earlier cells are kept.
        """
        self._known[digest] = cell
        if self.file is not None:
            line = json.dumps({"digest": digest, "row": row, "data": data, "cell": asdict(cell)})
            kept, then = "what was measured before is kept in it", "and the same command continues"
            advices = f"mend that, {then}", f"free some space, {then}"
            with errors_of_writing(self.file, kept, *advices), self.file.open("a", encoding="utf-8") as out:
                out.write(("\n" if self._broken else "") + line + "\n")
            self._broken = False


def _cell(scores: Any, seconds: Any, peak_mb: Any, note: Any = "") -> Cell:
    """Make a cell from the values of a line.

    Raises:
        TypeError, ValueError: the values are not a cell.
    """
    if not isinstance(note, str):
        raise TypeError("a text is expected")
    pairs = [(_measured(value), _measured(weight)) for value, weight in scores]
    return Cell(pairs, _measured(seconds), None if peak_mb is None else _measured(peak_mb), note)


def _measured(value: Any) -> float:
    if not is_number(value) and not isinstance(value, float):  # NaN is allowed: it can be a model's loss
        raise TypeError("a number is expected")
    return float(value)


def digest_of(*parts: Any) -> str:
    """The digest of several JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def folder_digest(path: str) -> str:
    """The digest of all options and tensors of a mixture or an adapter."""
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
    """The digest of a base model in memory: its config, and some values of each parameter (all would take long)."""
    options = {name: value for name, value in base.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
    for name, parameter in sorted(base.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().flatten()
            some = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].cpu()
            digest.update(str(some.tolist()).encode())
    return digest.hexdigest()

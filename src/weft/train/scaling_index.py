"""The index of a scaling cache: the first sequence, size and digest of each file."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError
from weft.files.digests import changes
from weft.files.reading import JsonTable, read_json

INDEX = "index.json"
DTYPES = ("float32", "bfloat16", "float16")


def damage_of(folder: Path) -> str | None:
    """The problem with a cache; "" if it does not exist, None if it is complete and unchanged."""
    if not os.path.lexists(folder):
        return ""
    try:
        index = read_index(folder)
        recorded = {file["name"]: {"bytes": file["bytes"], "digest": file["digest"]} for file in index["files"]}
        if index["index"] != digest_of_index(index):
            return f"{INDEX} was changed after it was saved"
    except (CheckpointError, KeyError):
        return f"{INDEX} is missing or damaged, or an earlier version wrote it"
    return "; ".join(changes(folder, recorded)) or None


def digest_of_index(index: dict[str, Any]) -> str:
    """The digest of an index without its own digest."""
    values = {name: value for name, value in index.items() if name != "index"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def read_index(folder: Path) -> JsonTable:
    """Read the index of a cache and check the types of its values.

    Raises:
        CheckpointError: it is missing or not valid.
    """
    index = read_json(folder / INDEX)
    index.whole("hidden_size", least=1)
    if index.string("dtype") not in DTYPES:
        raise index.wrong("dtype", f"one of {', '.join(DTYPES)}")
    for number, file in enumerate(index.tables("files")):
        file.whole("first"), file.whole("bytes")
        if file.string("name") != f"{number:05d}.safetensors":
            raise file.wrong("name", f"'{number:05d}.safetensors'")
    return index

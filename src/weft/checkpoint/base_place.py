"""Where a saved mixture's base model is, however the folders were moved.

A Hub id is stored as it is. A folder is stored twice. In the options it has its absolute path, because peft and
transformers look for a relative one in the current directory. In the manifest it has its path from the mixture's
folder, if they are near each other. That one is tried first: a mixture and its base model can be moved together. A
mixture that is moved alone finds the absolute one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from weft.checkpoint.manifest import MANIFEST_NAME
from weft.errors import CheckpointError
from weft.files.presence import may_be_hub_id
from weft.files.reading import read_json
from weft.files.writing import final_folder

FROM_HERE = "base_model"  # in the manifest
# From a mixture to the nearest folder that the base model is in, too: a mixture two levels below it, and a checkpoint
# two levels below the mixture.
_MOST_LEVELS_UP = 4
_MODEL_CONFIG = "config.json"


def is_path(name: str) -> bool:
    """Whether a base model's name cannot be a Hub id."""
    return name.count("/") > 1 or not may_be_hub_id(name)


def lasting_name(name: Any) -> Any:
    """A base model's name that means the same in every directory: a folder's absolute path; others as they are."""
    return os.path.abspath(name) if name and _is_model(name) else name


def path_from(folder: Path, name: Any) -> str | None:
    """The path of a base model from a mixture's folder, such as "../my-model"; None if it is no folder, or far away.

    Args:
        folder: of the mixture, which may be being written (`weft.files.writing.replace_folder`).
        name: the base model's folder or Hub id.
    """
    if not name or not _is_model(name):
        return None
    above, last = os.path.split(os.path.abspath(name))
    try:
        path = os.path.relpath(os.path.join(os.path.realpath(above), last), os.path.realpath(final_folder(folder)))
    except ValueError:  # on another drive of Windows
        return None
    return None if Path(path).parts.count("..") > _MOST_LEVELS_UP else Path(path).as_posix()


def found_base(folder: Path, name: Any) -> Any:
    """The base model that a saved mixture names, by a name that can be loaded here; if none can, as it was saved."""
    if not isinstance(name, str):
        return name
    return next((place for place in _places(folder, name) if _is_model(place)), name)


def refuse_missing_base(folder: Path, name: str) -> None:
    """Raise if a saved mixture names a folder as its base model, and there is none.

    Args:
        folder: of the mixture.
        name: the base model's, of `found_base`.

    Raises:
        CheckpointError: it is so; names all places that were looked at.
    """
    if is_path(name) and not os.path.lexists(name):
        places = dict.fromkeys([*_places(folder, name), os.path.abspath(name)])
        raise CheckpointError(
            f"base ({name}) is not here: no folder {', no folder '.join(places)}. The mixture {folder} names it: give "
            "the base model's folder or Hub id, with --base (in Python base=...)"
        )


def _places(folder: Path, name: str) -> list[str]:
    """Where the folder of a base model of that name may be, first choice first."""
    if not name:
        return []
    if not os.path.isabs(name):  # of earlier versions, and of other tools
        return [os.path.normpath(folder / name), os.path.abspath(name)]
    from_here = _path_in_manifest(folder)
    # Options that somebody changed by hand count.
    if from_here is None or os.path.basename(os.path.normpath(from_here)) != os.path.basename(name):
        return [name]
    return [os.path.normpath(os.path.join(os.path.realpath(folder), from_here)), name]


def _path_in_manifest(folder: Path) -> str | None:
    file = folder / MANIFEST_NAME
    if not os.path.lexists(file):
        return None
    path: str | None = read_json(file).string(FROM_HERE, None)
    return path


def _is_model(path: Any) -> bool:
    return os.path.isfile(os.path.join(path, _MODEL_CONFIG))

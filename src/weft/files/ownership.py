"""What may be overwritten, for every command and function that writes.

A new file, or files in a new or empty folder, can always be written. Existing files are replaced only if weft wrote
them and they are of the same kind as the new ones. Everything else is kept, and the error names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from weft.errors import ConfigError
from weft.files.reading import naming_problem, path_shown, reason
from weft.files.writing import folder_problem, settle

SHOWN = 5  # names in one message
# A file beside the adapter that marks it as folded, so that it may be replaced. (Not in the metadata of safetensors,
# which have no fixed order: files with equal tensors could differ.)
FOLDED = "weft_fold.json"


def used_folder_problem(folder: Path, what: str, *, own: Collection[str] = ()) -> str | None:
    """Why new files cannot be written into a folder; None if it is new, is empty, or has only entries in `own`.

    Args:
        folder: the folder to write into.
        what: what the message calls the folder.
        own: names of entries to ignore.
    """
    problem = naming_problem(folder)
    if problem is not None:
        return f"{what} ({path_shown(folder)}) cannot be made: {problem}"
    if not os.path.lexists(folder):
        return None
    if not os.path.isdir(folder):
        return f"{what} ({folder}) is a file, expected a folder: give a new or empty one"
    try:
        strangers = sorted({*os.listdir(folder)} - {*own})
    except OSError as err:
        return f"{what} ({folder}) cannot be read: {reason(err)}"
    if not strangers:
        return None
    shown = ", ".join(strangers[:SHOWN]) + (", ..." if len(strangers) > SHOWN else "")
    return f"{what} ({folder}) exists already and holds {shown}: give a new or empty folder"


def new_folder_problem(folder: Path, what: str = "output") -> str | None:
    """Why nothing new can be written into a folder; None if it can. Leftovers of a killed process are removed first.

    Raises:
        CheckpointError: they cannot be cleaned up.
    """
    settle(folder, leftovers=True)
    problem = used_folder_problem(folder, what)
    if problem is None and (cause := folder_problem(folder)) is not None:
        problem = f"{what} ({folder}) cannot be written: {cause}; give another folder"
    return problem


def refuse_used_folder(folder: Path, what: str = "output") -> None:
    """Raise if the folder is not new or empty; see `new_folder_problem`.

    Raises:
        ConfigError: the folder is not empty, or cannot be written.
        CheckpointError: the leftovers cannot be cleaned up.
    """
    problem = new_folder_problem(folder, what)
    if problem is not None:
        raise ConfigError(problem)


def folder_beside(model: str | os.PathLike[str], what: str) -> Path:
    """The default folder for a mixture made from `model`: beside it; for a Hub id in the working directory."""
    beside = Path(os.path.expanduser(model))
    beside = Path(os.path.abspath(beside)) if os.path.isdir(beside) else Path(beside.name)
    return beside.with_name(f"{beside.name}-{what}")


def refuse_strangers_file(file: Path, is_own: Callable[[Path], bool], what: str, kind: str) -> None:
    """Raise if the file exists and weft did not write it.

    Args:
        file: the file to be written.
        is_own: whether an existing file is of this kind and from weft. An error from it counts as False.
        what: what the message calls the file.
        kind: the kind of file, for the message.

    Raises:
        ConfigError: weft did not write the existing file.
    """
    problem = naming_problem(file)
    if problem is not None:
        raise ConfigError(f"{what} ({path_shown(file)}) cannot be written: {problem}")
    if not os.path.lexists(file):
        return
    try:
        own = os.path.isfile(file) and is_own(file)
    except (OSError, ValueError, KeyError, TypeError):
        own = False
    if not own:
        raise ConfigError(
            f"{what} ({file}) is there already and is no {kind} that weft wrote: give another file, or move it away"
        )

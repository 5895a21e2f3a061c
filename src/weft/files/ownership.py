"""What may be written over: one rule for every command and function that writes.

Where nothing is, or an empty folder, anything may be written. What is there is replaced where weft itself wrote it, of
the kind that is written now; anything else stays, and the error names it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from weft.errors import ConfigError
from weft.files.reading import naming_problem, path_shown, reason
from weft.files.writing import check_folder, settle

SHOWN = 5  # names in one message


def used_folder_problem(folder: Path, what: str, *, own: Collection[str] = ()) -> str | None:
    """Why something new cannot be written into a folder; None where it is not there, empty, or has only our own.

    Args:
        folder: to write into.
        what: it is called, for the message.
        own: names of entries that do not count.
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


def refuse_used_folder(folder: Path, what: str = "output") -> None:
    """Raise where nothing new can be written into a folder; what a killed writer has left there is put in order first.

    Raises:
        ConfigError: it is there and not empty, or cannot be written.
        CheckpointError: it cannot be put in order.
    """
    settle(folder, leftovers=True)
    problem = used_folder_problem(folder, what)
    if problem is not None:
        raise ConfigError(problem)
    check_folder(folder, what)


def refuse_strangers_file(file: Path, is_own: Callable[[Path], bool], what: str, kind: str) -> None:
    """Raise where a file is there that weft did not write.

    Args:
        file: to be written.
        is_own: whether a file that is there is of this kind, and weft's; an error means that it is not.
        what: the file is called, for the message.
        kind: of file, for the message.

    Raises:
        ConfigError: it is somebody else's.
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

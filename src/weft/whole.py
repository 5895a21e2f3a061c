"""Files and folders that are replaced whole or not at all, also when the disk is full half-way.

Everything is written beside what it replaces and takes its place when it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from weft.errors import CheckpointError, first_line

# In the folder itself, which is on the right disk for certain, also where it is a link or a mount point.
_NEW, _OLD = ".part", ".old"


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside the old one and put it in its place when it is whole."""
    unfinished = file.with_name(file.name + ".part")
    try:
        write(unfinished)
        os.replace(unfinished, file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def replace_folder(folder: Path, write: Callable[[Path], Any], last: str) -> None:
    """Let `write` fill a new folder, and put all that is in it in the place of what the folder has of these names.

    Whatever else is in the folder stays.

    Args:
        folder: need not exist.
        write: writes into the empty folder it is given.
        last: the file without which nothing loads the folder: it goes first and comes last, so that no mix of old and
            new is ever read.

    Raises:
        CheckpointError: writing failed (a full disk, no permission); the folder is then as it was.
    """
    folder = folder.resolve()
    new, old = folder / _NEW, folder / _OLD
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _settle(folder)  # after a process that was killed on its way
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        write(new)
        old.mkdir()
        _exchange(folder, sorted(os.listdir(new), key=lambda name: name == last))
    except BaseException as err:
        _settle(folder)
        shutil.rmtree(new, ignore_errors=True)
        if not existed and folder.is_dir() and not os.listdir(folder):
            folder.rmdir()
        if isinstance(err, (OSError, SafetensorError)):
            kept = "what was there before is unchanged" if existed else "nothing is left there"
            raise CheckpointError(
                f"{folder} cannot be written: {first_line(err)} ({kept}); free some space, or give another folder"
            ) from err
        raise
    shutil.rmtree(old)
    new.rmdir()


def _exchange(folder: Path, names: list[str]) -> None:
    for name in reversed(names):
        if os.path.lexists(folder / name):
            os.rename(folder / name, folder / _OLD / name)
    for name in names:
        os.rename(folder / _NEW / name, folder / name)


def _settle(folder: Path) -> None:
    """Undo an exchange that was not completed: new entries are still waiting then."""
    new, old = folder / _NEW, folder / _OLD
    if not old.is_dir():
        return
    if new.is_dir() and os.listdir(new):
        for name in os.listdir(old):
            _remove(folder / name)
            os.rename(old / name, folder / name)
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

"""Atomic replacement of files and folders, also if the disk is full or the process is killed.

New content is written beside the old content and replaces it when it is complete. For a folder these are

    FOLDER/.part/           the new entries: first while they are written, then those that are still to be moved
    FOLDER/.part/.exchange  how to undo the replacement; written before the first entry is moved
    FOLDER/.old/            the old entries, until all new entries are moved

They are inside the folder, so that they are on the same file system even if the folder is a link or a mount point.
If a process was killed between two moves, the next reader or writer first restores the old entries (`settle`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError, ConfigError, first_line
from weft.files.failures import NotWrittenError, errors_of_writing, failure, is_failed_write, is_full_disk
from weft.files.reading import naming_problem, path_shown, reason

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD, _EXCHANGE, _UNFINISHED = ".part", ".old", ".exchange", "unfinished-"
_PROBE = ".weft-"  # an empty folder, removed at once
# The config file that is required to load a folder, in each layout.
_CONFIGS = ("adapter_config.json", "xlora_config.json")
# Seconds to wait for another process that has locked a folder.
_PATIENCE = 10.0
_UNCHANGED, _NOTHING = "what was there before is unchanged", "nothing is left there"
_WAITS = "what was there before is in {}, and is restored when the folder is next read or written"


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside the old one, and replace the old one when the new one is complete.

    Raises:
        CheckpointError: the file cannot be written; the old one is unchanged.
    """
    unfinished = file.with_name(f"{file.name}{_NEW}")
    kept = _UNCHANGED if os.path.lexists(file) else _NOTHING
    with errors_of_writing(file, kept, "give another file"):
        try:
            _remove(unfinished)  # from a killed process; if it is a link, writing would follow it
            write(unfinished)
            os.replace(unfinished, file)
        except BaseException:
            with suppress(OSError):
                _remove(unfinished)
            raise


def replace_folder(folder: Path, write: Callable[[Path], Any], last: str) -> None:
    """Let `write` fill a new folder, then move its entries into `folder`, where they replace those of the same names.

    Other entries of `folder` stay.

    Args:
        folder: the folder; it is created if it does not exist.
        write: writes into the empty folder that it is given.
        last: the config file, without which the folder cannot be loaded. The old one is removed first and the new one
            is moved last, so that a mix of old and new files is never loaded.

    Raises:
        CheckpointError: writing failed (full disk, no permission) and the folder is unchanged; or another process is
            writing there.
    """
    existed = False
    try:
        folder = folder.resolve()
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _put_in_order(folder)
            _replace(folder, write, last)
    except BaseException as err:
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # only if it is empty
        if is_failed_write(err):
            kept = _UNCHANGED if existed else _NOTHING
            with suppress(OSError):
                kept = _WAITS.format(folder / _OLD) if _is_halfway(folder) else kept
            cause = err.__cause__ if isinstance(err, NotWrittenError) and err.__cause__ else err
            raise CheckpointError(failure(folder, cause, kept, "give another folder")) from err
        raise


def final_folder(folder: Path) -> Path:
    """The folder itself; or, if `replace_folder` is writing it, the one whose place it will take."""
    return folder.parent if folder.name == _NEW else folder


def make_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` fill a temporary folder, then rename it to `folder`, whose old content is removed.

    Several processes may do this at the same time: the last one wins. Leftovers of killed processes are removed.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    kept = _UNCHANGED if os.path.lexists(folder) else _NOTHING
    with errors_of_writing(folder, kept, "give another folder"), ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.parent):
            for path in folder.parent.glob(f"{_UNFINISHED}*"):
                _remove_abandoned(path)
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(_locked(made))
        fill(made)
        _remove(folder)
        os.rename(made, folder)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process is still alive
                shutil.rmtree(folder)
        finally:
            os.close(file)


@contextmanager
def temporary_folder(fill: Callable[[Path], Any]) -> Iterator[Path]:
    """A temporary folder that `fill` fills, and that is removed at the end of the block.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    with ExitStack() as stack:
        advice = "set TMPDIR to another folder"
        with errors_of_writing(f"temporary folder {tempfile.gettempdir()}", _NOTHING, advice):
            made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            fill(folder)
        yield folder


def settle(folder: Path, *, leftovers: bool = False) -> None:
    """Restore the old entries of a folder if a process was killed while it replaced them.

    Args:
        folder: the folder; it need not exist.
        leftovers: also remove temporary entries of a killed process that do not affect loading.

    Raises:
        CheckpointError: the folder cannot be restored, or another process is writing there.
    """
    if not (_is_halfway(folder) or (leftovers and any(os.path.lexists(folder / name) for name in (_NEW, _OLD)))):
        return
    try:
        with _locked(folder, or_fail=True):
            _put_in_order(folder)
    except OSError as err:
        raise CheckpointError(
            f"{folder} was being replaced by a process that was killed, and cannot be put back in order: "
            f"{first_line(err)}. Make it writable; or, when nobody writes there, move what is in {folder / _OLD} one "
            f"level up and remove {folder / _NEW}"
        ) from err


def check_file(file: str | os.PathLike[str], option: str) -> None:
    """Raise if a file cannot be written. To be called before a long computation whose result goes there.

    Raises:
        ConfigError: the parent folder does not exist or is not writable, or the path is a folder.
    """
    problem = file_problem(file)
    if problem is not None:
        raise ConfigError(f"{option} ({path_shown(file)}) cannot be written: {problem}; give another file")


def file_problem(file: str | os.PathLike[str]) -> str | None:
    """Why a file cannot be written; None if it can."""
    problem = naming_problem(f"{os.fspath(file)}{_NEW}")
    if problem is not None:
        return problem
    folder = Path(file).absolute().parent
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    probe = Path(f"{os.fspath(file)}{_NEW}")
    try:
        if os.path.isdir(file) or not os.fspath(file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _remove(probe)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as err:
        return err.strerror or first_line(err)
    return None


def check_folder(folder: str | os.PathLike[str], option: str) -> None:
    """Raise if a folder cannot be created or written. To be called before a long computation, as `check_file`.

    Raises:
        ConfigError: the path is a file, or is not writable.
    """
    problem = folder_problem(folder)
    if problem is not None:
        raise ConfigError(f"{option} ({folder}) cannot be written: {problem}; give another folder")


def folder_problem(folder: str | os.PathLike[str]) -> str | None:
    """Why a folder cannot be created or written; None if it can. A full disk is no reason: it may have space later.

    For a new folder, a temporary one is made in the nearest folder above it and removed again.
    """
    path = Path(folder).absolute()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as err:
        return err.strerror or first_line(err)
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        return f"{there} is a file, expected a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not yours to write in"
    # An existing folder may be another process's output too, which a temporary folder in it would disturb.
    return None if there == path else _making_problem(there)


def _making_problem(folder: Path) -> str | None:
    """Why no folder can be made in this one; None if it can. Some file systems allow none, whatever the rights are."""
    try:
        os.rmdir(tempfile.mkdtemp(prefix=_PROBE, dir=folder))
    except OSError as err:
        return None if is_full_disk(err) else f"no folder can be made in {folder} ({reason(err)})"
    return None


def _replace(folder: Path, write: Callable[[Path], Any], last: str) -> None:
    new, old = folder / _NEW, folder / _OLD
    if os.path.lexists(old):
        raise FileExistsError(errno.EEXIST, "what is there is not weft's, and in the way", str(old))
    try:
        new.mkdir()
        write(new)
        names = sorted(os.listdir(new), key=lambda name: name == last)
        added = [name for name in names if not os.path.lexists(folder / name)]
        (new / _EXCHANGE).write_text(json.dumps({"last": last, "added": added}), encoding="utf-8")
        old.mkdir()
        for name in reversed(names):
            if name not in added:
                os.rename(folder / name, old / name)
        for name in names:
            os.rename(new / name, folder / name)
    except BaseException:
        _put_in_order(folder)
        raise
    # All new entries are in place: an error from here on must not undo the replacement.
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def _is_halfway(folder: Path) -> bool:
    """Whether a replacement was interrupted: entries in .part are still to be moved."""
    new, old = folder / _NEW, folder / _OLD
    return _is_own_folder(old) and _is_own_folder(new) and bool(set(os.listdir(new)) - {_EXCHANGE})


def _is_own_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _put_in_order(folder: Path) -> None:
    """Undo an interrupted replacement, or remove the leftovers of a completed one. It can itself be interrupted."""
    new, old = folder / _NEW, folder / _OLD
    if _is_halfway(folder):
        last, added = _exchange_of(new)
        for name in sorted(added, key=lambda name: name not in last):
            if not os.path.lexists(new / name):  # it was moved already
                _remove(folder / name)
        for name in sorted(os.listdir(old), key=lambda name: name in last):
            _remove(folder / name)
            os.rename(old / name, folder / name)
    if os.path.lexists(new):  # removed last: a .old without a .part is not weft's
        _remove(old)
        _remove(new)


def _exchange_of(new: Path) -> tuple[tuple[str, ...], list[str]]:
    """(config files to restore last, names of new entries). Earlier versions of weft did not write .exchange."""
    try:
        note = json.loads((new / _EXCHANGE).read_text(encoding="utf-8"))
        added = [name for name in note["added"] if os.path.basename(name) == name and name not in ("", ".", "..")]
        return (str(note["last"]),), added
    except (OSError, ValueError, KeyError, TypeError):
        return _CONFIGS, []


@contextmanager
def _locked(folder: Path, *, or_fail: bool = False) -> Iterator[None]:
    """Hold a lock on a folder. The lock of a killed process is released.

    Args:
        folder: an existing folder.
        or_fail: raise if the file system has no locks (Windows, some network drives), instead of going on without.

    Raises:
        CheckpointError: another process keeps the lock; or `or_fail` and there are no locks.
    """
    file = os.open(folder, os.O_RDONLY) if fcntl is not None else -1
    try:
        if not _lock(file, folder) and or_fail:
            raise CheckpointError(
                f"{folder} was being replaced by a process that was killed, or is at work: this file system has no "
                f"locks to tell. When nobody writes there, move what is in {folder / _OLD} one level up and remove "
                f"{folder / _NEW}"
            )
        yield
    finally:
        if file >= 0:
            os.close(file)


def _lock(file: int, folder: Path) -> bool:
    """Lock an open folder; False if the file system has no locks."""
    end = time.monotonic() + _PATIENCE
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError as err:
            if time.monotonic() > end:
                raise CheckpointError(
                    f"{folder} is being written by another process: wait until it is done, or give another folder"
                ) from err
            time.sleep(0.05)
        except OSError:
            break
    return False


def _remove(path: Path) -> None:
    if _is_own_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

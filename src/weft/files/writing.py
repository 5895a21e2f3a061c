"""Files and folders that are replaced whole or not at all, also when the disk is full or the process killed half-way.

Everything is written beside what it replaces and takes its place when it is complete. For a folder that is

    FOLDER/.part/           the new entries while they are written, then those that are not in their place yet
    FOLDER/.part/.exchange  how to undo, before the first of them is moved
    FOLDER/.old/            the old entries, until all new ones are in their place

in the folder itself, which is on the right disk for certain, also where it is a link or a mount point. Whoever reads or
writes a folder whose writer was killed between two moves puts the old entries back first (`settle`).
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

from safetensors import SafetensorError

from weft.errors import CheckpointError, ConfigError, WeftError, first_line
from weft.files.reading import naming_problem, path_shown

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_NEW, _OLD, _EXCHANGE, _UNFINISHED = ".part", ".old", ".exchange", "unfinished-"
# The files without which nothing loads a folder, of which each layout has one.
_CONFIGS = ("adapter_config.json", "xlora_config.json")
# Seconds for which another process may have a folder.
_PATIENCE = 10.0
_UNCHANGED, _NOTHING = "what was there before is unchanged", "nothing is left there"
_WAITS = "what was there before lies in {}, and whoever reads or writes the folder next puts it back"
# What libraries say where a file cannot be written: tokenizers (Rust) in a bare Exception, torch in a RuntimeError.
_SIGNS = ("(os error ", "PytorchStreamWriter", "inline_container.cc")


class NotWrittenError(CheckpointError):
    """A file cannot be written; what was there before is unchanged."""


def is_failed_write(err: BaseException) -> bool:
    """Whether an error is one of writing (a full disk, no permission), whichever library says so."""
    if isinstance(err, WeftError):
        return isinstance(err, NotWrittenError)
    return isinstance(err, (OSError, SafetensorError)) or any(sign in str(err) for sign in _SIGNS)


@contextmanager
def errors_of_writing(what: str | os.PathLike[str], kept: str, advice: str) -> Iterator[None]:
    """What cannot be written inside is a `CheckpointError` that names it, what is kept, and what to do."""
    try:
        yield
    except Exception as err:
        if is_failed_write(err) and not isinstance(err, WeftError):
            text = f"{os.fspath(what)} cannot be written: {first_line(err)} ({kept}); {advice}"
            raise NotWrittenError(text) from err
        raise


def replace_file(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside the old one and put it in its place when it is whole.

    Raises:
        CheckpointError: it cannot be written; what was there before is unchanged.
    """
    unfinished = file.with_name(f"{file.name}{_NEW}")
    kept = _UNCHANGED if os.path.lexists(file) else _NOTHING
    with errors_of_writing(file, kept, "free some space, or give another file"):
        try:
            _remove(unfinished)  # of a process that was killed; a link would lead elsewhere
            write(unfinished)
            os.replace(unfinished, file)
        except BaseException:
            with suppress(OSError):
                _remove(unfinished)
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
        CheckpointError: writing failed (a full disk, no permission), and the folder is as it was; or another process
            is writing there.
    """
    existed = False
    try:
        folder = folder.resolve()
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            _put_in_order(folder)
            _replace(folder, write, last)
    except BaseException as err:
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # where it is empty
        if is_failed_write(err):
            kept = _UNCHANGED if existed else _NOTHING
            with suppress(OSError):
                kept = _WAITS.format(folder / _OLD) if _is_halfway(folder) else kept
            cause = err.__cause__ if isinstance(err, NotWrittenError) and err.__cause__ else err
            raise CheckpointError(
                f"{folder} cannot be written: {first_line(cause)} ({kept}); free some space, or give another folder"
            ) from err
        raise


def make_folder(folder: Path, fill: Callable[[Path], Any]) -> None:
    """Let `fill` fill a folder that gets its name, or takes the place of another one, when it is whole.

    Several processes may do that at the same time; the last one's stays. What one that was killed has left is removed.

    Raises:
        CheckpointError: it cannot be written.
    """
    kept = _UNCHANGED if os.path.lexists(folder) else _NOTHING
    with errors_of_writing(folder, kept, "free some space, or give another folder"), ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent):
            for path in folder.parent.glob(f"{_UNFINISHED}*"):
                _remove_abandoned(path)
            made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder.parent))
            stack.callback(shutil.rmtree, made, ignore_errors=True)
            stack.enter_context(_alone(made))
        fill(made)
        _remove(folder)
        os.rename(made, folder)


def _remove_abandoned(folder: Path) -> None:
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody has it any more
                shutil.rmtree(folder)
        finally:
            os.close(file)


@contextmanager
def temporary_folder(fill: Callable[[Path], Any]) -> Iterator[Path]:
    """A folder for temporary files, filled by `fill`, until the end of the block.

    Raises:
        CheckpointError: it cannot be written.
    """
    with ExitStack() as stack:
        advice = "free some space there, or set TMPDIR to another folder"
        with errors_of_writing(f"temporary folder {tempfile.gettempdir()}", _NOTHING, advice):
            made = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(made))
            fill(folder)
        yield folder


def settle(folder: Path, *, leftovers: bool = False) -> None:
    """Put the old entries of a folder back, where a process was killed while it replaced them.

    Args:
        folder: need not exist.
        leftovers: also remove what such a process has left and nobody reads, so that a folder is empty that was.

    Raises:
        CheckpointError: the folder cannot be put in order, or another process is writing there.
    """
    if not (_is_halfway(folder) or (leftovers and any(os.path.lexists(folder / name) for name in (_NEW, _OLD)))):
        return
    try:
        with _alone(folder, or_fail=True):
            _put_in_order(folder)
    except OSError as err:
        raise CheckpointError(
            f"{folder} was being replaced by a process that was killed, and cannot be put back in order: "
            f"{first_line(err)}. Make it writable; or, when nobody writes there, move what is in {folder / _OLD} one "
            f"level up and remove {folder / _NEW}"
        ) from err


def check_file(file: str | os.PathLike[str], option: str) -> None:
    """Raise where a file cannot be written, before the work is done that it is for.

    Raises:
        ConfigError: there is no such folder, it is not writable, or the file is a folder.
    """
    problem = naming_problem(f"{os.fspath(file)}{_NEW}")
    if problem is not None:
        raise ConfigError(f"{option} ({path_shown(file)}) cannot be written: {problem}; give another file")
    probe = Path(f"{os.fspath(file)}{_NEW}")
    try:
        if os.path.isdir(file) or not os.fspath(file):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _remove(probe)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as err:
        reason = err.strerror or first_line(err)
        raise ConfigError(f"{option} ({file}) cannot be written: {reason}; give another file") from err


def check_folder(folder: str | os.PathLike[str], option: str) -> None:
    """Raise where a folder cannot be made or written in, before the work is done that it is for.

    Raises:
        ConfigError: what is there is a file, or not writable.
    """
    problem = folder_problem(folder)
    if problem is not None:
        raise ConfigError(f"{option} ({folder}) cannot be written: {problem}; give another folder")


def folder_problem(folder: str | os.PathLike[str]) -> str | None:
    """Why a folder cannot be made or written in, as far as can be told; None where it can."""
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
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not yours to write in"


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
    # From here on the folder is the new one, whatever happens.
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)


def _is_halfway(folder: Path) -> bool:
    """Whether some entries were moved and others not: new ones are still waiting then."""
    new, old = folder / _NEW, folder / _OLD
    return _is_own_folder(old) and _is_own_folder(new) and bool(set(os.listdir(new)) - {_EXCHANGE})


def _is_own_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _put_in_order(folder: Path) -> None:
    """Undo an exchange that was not completed, and remove what is left of one that was. May itself be killed."""
    new, old = folder / _NEW, folder / _OLD
    if _is_halfway(folder):
        last, added = _exchange_of(new)
        for name in sorted(added, key=lambda name: name not in last):
            if not os.path.lexists(new / name):  # it was moved
                _remove(folder / name)
        for name in sorted(os.listdir(old), key=lambda name: name in last):
            _remove(folder / name)
            os.rename(old / name, folder / name)
    if os.path.lexists(new):  # and goes last: without it the other is somebody's
        _remove(old)
        _remove(new)


def _exchange_of(new: Path) -> tuple[tuple[str, ...], list[str]]:
    """(files that come last, entries that the folder did not have); earlier versions left no such note."""
    try:
        note = json.loads((new / _EXCHANGE).read_text(encoding="utf-8"))
        added = [name for name in note["added"] if os.path.basename(name) == name and name not in ("", ".", "..")]
        return (str(note["last"]),), added
    except (OSError, ValueError, KeyError, TypeError):
        return _CONFIGS, []


@contextmanager
def _alone(folder: Path, *, or_fail: bool = False) -> Iterator[None]:
    """Have a folder to oneself, among all processes that do the same; one that is killed has it no more.

    Args:
        folder: exists.
        or_fail: where there are no locks (Windows, some network drives), fail; else go on without.

    Raises:
        CheckpointError: another process has it, and keeps it; or there are no locks.
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
    """Lock an open folder; False where that cannot be done."""
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

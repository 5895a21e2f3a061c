"""One case tried, and what is wrong with what came of it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import random
import resource
import shutil
import signal
import stat
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import WeftError

SECONDS = 30  # that a case may take: none loads more than a tiny model
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1}


@dataclass
class Case:
    """What is tried.

    Attributes:
        inputs: the folder of everything that is read, which must stay as it is.
        output: the folder that may be written into.
        outside: a folder that nothing may be written into.
        rng: of this case alone.
        what: was mutated, and what is tried, in words.
        named: parts of which one must be in an error's message; none where any message will do.
    """

    inputs: Path
    output: Path
    outside: Path
    rng: random.Random
    what: list[str] = field(default_factory=list)
    named: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What came of it: "right", "refused", or what is wrong; and the words that a person needs."""

    outcome: str
    words: str
    trace: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it must not be."""
        return self.outcome not in ("right", "refused")


class Wrong(AssertionError):
    """A result that is another one than it should be, without an error."""


def judge(case: Case, action: Callable[[Case], Any], base_is_whole: Callable[[], bool]) -> Verdict:
    """Try a case."""
    before = _digest(case.inputs), _digest(case.outside)
    outcome, words, trace = "right", "", ""
    with _watched(case.output) as written, _quiet() as said:
        try:
            with _limited():
                action(case)
        except WeftError as err:
            outcome, words = "refused", str(err)
            if case.named and not any(part in words for part in case.named):
                outcome = "nameless"
        except Wrong as err:
            outcome, words = "wrong", str(err)
        except TimeoutError:
            outcome, words, trace = "hung", f"more than {SECONDS} seconds", traceback.format_exc()
        except BaseException as err:
            if isinstance(err, KeyboardInterrupt):
                raise
            outcome, words, trace = "raw", f"{type(err).__name__}: {err}"[:300], traceback.format_exc()
    if "Traceback (most recent call last)" in said.getvalue():
        outcome, words = "raw", said.getvalue()[-2000:]
    if written:
        return Verdict("wrote outside", ", ".join(written[:3]), trace)
    if (_digest(case.inputs), _digest(case.outside)) != before:
        return Verdict("inputs changed", words, trace)
    if not base_is_whole():
        return Verdict("base changed", words, trace)
    return Verdict(outcome, words, trace)


def _digest(folder: Path) -> str:
    """Of all names, kinds, modes and contents below a folder, without a look into what is no file."""
    digest = hashlib.sha256()
    for place, folders, files in sorted(os.walk(folder, onerror=lambda err: None)):
        for name in sorted([*folders, *files]):
            path = os.path.join(place, name)
            found = os.lstat(path)
            digest.update(f"{os.path.relpath(path, folder)} {found.st_mode} ".encode(errors="surrogateescape"))
            if stat.S_ISLNK(found.st_mode):
                digest.update(os.readlink(path).encode())
            elif stat.S_ISREG(found.st_mode):
                digest.update(f"{found.st_size} {found.st_mtime_ns}".encode())
                if found.st_size < 2**22 and os.access(path, os.R_OK):
                    with open(path, "rb") as opened:
                        digest.update(opened.read())
    return digest.hexdigest()


_watch: list[Any] = [None, []]  # where may be written, and what was written elsewhere


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    allowed, written = _watch
    if allowed is None:
        return
    if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
        written.append(f"{event} {arguments[0]!r}")
    paths: tuple[Any, ...] = ()
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITES):
            paths = (path,)
    elif event in _PATHS:
        paths = arguments[: _PATHS[event]]
    for path in paths:
        if isinstance(path, int) or path is None:
            continue
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith((allowed, os.environ["HF_HOME"], "/dev/", "/proc/")) and "__pycache__" not in real:
            written.append(f"{event} {real}")


sys.addaudithook(_hook)


@contextlib.contextmanager
def _watched(output: Path) -> Iterator[list[str]]:
    """What is written outside of a folder, or started as a process."""
    output.mkdir(parents=True, exist_ok=True)
    before, directory = tempfile.tempdir, os.getcwd()
    tempfile.tempdir = str(output)
    os.chdir(output)
    written: list[str] = []
    _watch[:] = [os.path.realpath(output), written]
    try:
        yield written
    finally:
        _watch[0] = None
        tempfile.tempdir = before
        os.chdir(directory)


@contextlib.contextmanager
def _quiet() -> Iterator[io.StringIO]:
    said = io.StringIO()
    given = sys.stdin
    sys.stdin = io.StringIO("yes\none two\n/exit\n")
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield said
    finally:
        sys.stdin = given


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A time limit."""

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def limit_memory(gigabytes: int = 6) -> None:
    """Let allocations beyond what is used now fail in this process, and not the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + gigabytes * 2**30, resource.RLIM_INFINITY))


def give_up_rights() -> None:
    """Let the modes of files mean something for the superuser too, who may read and write all of them else."""
    if os.geteuid() != 0:
        return
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(header, data) == 0:
        for number in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            data[0] &= ~(1 << number)  # effective
            data[1] &= ~(1 << number)  # permitted
        libc.capset(header, data)


def remove(folder: Path) -> None:
    """Take a case's folder away, whatever became of its modes."""
    for place, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(place, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)
    shutil.rmtree(folder, ignore_errors=True)

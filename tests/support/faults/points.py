"""The points at which a program changes files below a folder, and what goes wrong at one of them.

Every making, writing, moving and removing of a file or folder is such a point: Python's own calls, and those of
safetensors, torch and tokenizers, which write a file at once. At the chosen one the process is killed, or the call
fails as it does on a full disk or without permission, half of what it was to write being written.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerFast

KILLED = 9
# What fails when the disk is full: names and content need space, removing needs none.
_NEEDS_SPACE = {"mkdir", "open", "write", "whole file"}
_CALLS = ("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "symlink", "link", "truncate")


@dataclass
class Points:
    """Counts the points below a folder.

    Args:
        root: the folder.
        at: the point at which something goes wrong, from 0; None counts only.
        how: "kill"; "full once" or "denied once" for that call alone, "full" or "denied" for it and all after it.
    """

    root: Path
    at: int | None = None
    how: str = "kill"
    seen: list[str] = field(default_factory=list)
    hit: bool = False

    @contextlib.contextmanager
    def watched(self):
        """Inside, what is done below the folder is counted, and goes wrong."""
        with contextlib.ExitStack() as stack:
            for name in _CALLS:
                self._patch(stack, os, name, self._call(name, getattr(os, name)))
            for module in (builtins, io):
                self._patch(stack, module, "open", self._open(module.open))
            self._patch(stack, os, "open", self._open_number(os.open))
            self._patch(stack, os, "sendfile", self._sendfile(os.sendfile))
            whole = (
                (torch, "save", lambda obj, file, *rest, **more: file, _torch_error),
                (safetensors.torch, "serialize_file", lambda tensors, file, *rest, **more: file, _safetensors_error),
                (PreTrainedTokenizerFast, "_save_pretrained", _tokenizer_file, _tokenizers_error),
            )
            for owner, name, file_of, error in whole:
                self._patch(stack, owner, name, self._whole_file(getattr(owner, name), file_of, error))
            yield self

    def _patch(self, stack, owner, name, replacement):
        original = getattr(owner, name)
        stack.callback(setattr, owner, name, original)
        setattr(owner, name, replacement)

    def passes(self, kind, path):
        """Count a point; whether something goes wrong there."""
        if not self._is_below(path):
            return True
        self.seen.append(f"{kind} {Path(path).name}")
        number = len(self.seen) - 1
        if self.at is None or number < self.at or (number > self.at and self.how not in ("full", "denied")):
            return True
        needs_space = kind in _NEEDS_SPACE or (self.how == "full once" and kind in _MOVES)
        if self.how.startswith("full") and not needs_space:
            return True
        self.hit = True
        return False

    def fail(self, path=None, error=None):
        """Let it go wrong."""
        if self.how == "kill":
            os._exit(KILLED)
        number = errno.ENOSPC if self.how.startswith("full") else errno.EACCES
        raise OSError(number, os.strerror(number), None if path is None else str(path)) if error is None else error

    def _is_below(self, path):
        with contextlib.suppress(OSError, TypeError, ValueError):
            return Path(os.path.abspath(os.fsdecode(path))).is_relative_to(self.root)
        return False

    def _call(self, name, original):
        def call(path, *args, dir_fd=None, **kwargs):
            full = path
            if dir_fd is not None:
                full = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), os.fspath(path))
                kwargs["dir_fd"] = dir_fd
            if not self.passes(name, full):
                self.fail(full)
            return original(path, *args, **kwargs)

        return call

    def _open(self, original):
        def opened(file, mode="r", *args, **kwargs):
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return original(file, mode, *args, **kwargs)
            if not self.passes("open", file):
                if self.how == "kill":
                    original(file, mode, *args, **kwargs).close()  # it is there, and empty
                self.fail(file)
            result = original(file, mode, *args, **kwargs)
            return _Writing(result, file, self) if self._is_below(file) else result

        return opened

    def _open_number(self, original):
        def opened(path, flags, *args, **kwargs):
            if flags & os.O_CREAT and not self.passes("open", path):
                self.fail(path)
            return original(path, flags, *args, **kwargs)

        return opened

    def _sendfile(self, original):
        def send(out, source, offset, count):
            path = os.readlink(f"/proc/self/fd/{out}")
            if offset == 0 and not self.passes("write", path):
                original(out, source, 0, os.fstat(source).st_size // 2)
                self.fail(path)
            return original(out, source, offset, count)

        return send

    def _whole_file(self, original, file_of, error):
        def write(*args, **kwargs):
            path = file_of(*args, **kwargs)
            if self.passes("whole file", path):
                with self._uncounted():
                    return original(*args, **kwargs)
            with self._uncounted():
                original(*args, **kwargs)
            os.truncate(path, os.path.getsize(path) // 2)
            self.fail(path, None if self.how.startswith("denied") else error())

        return write

    @contextlib.contextmanager
    def _uncounted(self):
        at, self.at, seen = self.at, None, len(self.seen)
        try:
            yield
        finally:
            self.at = at
            del self.seen[seen:]


_MOVES = {"rename", "replace"}


class _Writing:
    """A file of which half of what is written stays, where writing goes wrong."""

    def __init__(self, file, path, points):
        self._file, self._path, self._points, self._writes = file, path, points, 0

    def write(self, data):
        self._writes += 1
        # A figure is written in thousands of pieces: the first, second, fourth, eighth ... are points.
        if self._writes & (self._writes - 1) == 0 and not self._points.passes("write", self._path):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._points.fail(self._path)
        return self._file.write(data)

    def writelines(self, lines):
        for line in lines:
            self.write(line)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *args):
        return self._file.__exit__(*args)

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


def _tokenizer_file(tokenizer, save_directory, *args, **kwargs):
    return os.path.join(save_directory, "tokenizer.json")


def _torch_error():
    return RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


def _safetensors_error():
    return SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def _tokenizers_error():
    return Exception("No space left on device (os error 28)")

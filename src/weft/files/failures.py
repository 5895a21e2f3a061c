"""Failed writes: whether an error of any library is one, and one clear error instead of it."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from weft.errors import CheckpointError, WeftError, first_line

_FULL = {errno.ENOSPC, errno.EDQUOT}  # a full disk, a used quota
# In the messages of failed writes that are no OSError: tokenizers (Rust) raises Exception, torch raises RuntimeError.
_SIGNS = ("(os error ", "PytorchStreamWriter", "inline_container.cc")


class NotWrittenError(CheckpointError):
    """A file cannot be written. The old file, if any, is unchanged."""


def is_failed_write(err: BaseException) -> bool:
    """Whether an error of any library means that a write failed (full disk, no permission)."""
    from safetensors import SafetensorError  # not above: the checks of options import this module, for the docs too

    if isinstance(err, WeftError):
        return isinstance(err, NotWrittenError)
    return isinstance(err, (OSError, SafetensorError)) or any(sign in str(err) for sign in _SIGNS)


def is_full_disk(err: BaseException) -> bool:
    """Whether a write failed because the disk is full, or the error gives no reason."""
    if isinstance(err, OSError):
        return err.errno is None or err.errno in _FULL
    named = re.search(r"\(os error (\d+)\)", str(err))
    return named is None or int(named[1]) in _FULL


def failure(
    what: str | os.PathLike[str], err: BaseException, kept: str, advice: str, if_full: str | None = None
) -> str:
    """The message of a failed write; for the arguments see `errors_of_writing`."""
    if is_full_disk(err):
        advice = if_full or f"free some space, or {advice}"
    return f"{os.fspath(what)} cannot be written: {first_line(err)} ({kept}); {advice}"


@contextmanager
def errors_of_writing(
    what: str | os.PathLike[str], kept: str, advice: str, if_full: str | None = None
) -> Iterator[None]:
    """Turn a failed write in the block into an error with the path, what is kept, and what to do.

    Args:
        what: the file or folder that is written.
        kept: the state after the failure, for the message.
        advice: what to do, for the message.
        if_full: what to do if the disk is full; None means to free some space, or `advice`.

    Raises:
        NotWrittenError: a write in the block failed.
    """
    try:
        yield
    except Exception as err:
        if is_failed_write(err) and not isinstance(err, WeftError):
            raise NotWrittenError(failure(what, err, kept, advice, if_full)) from err
        raise

"""How much is printed: results and errors only, also weft's notices, or also the messages of other libraries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

QUIET, NORMAL, VERBOSE = range(3)
_wanted = [NORMAL]  # a stack; the last level is in effect


@contextmanager
def loudness(wanted: int) -> Iterator[None]:
    """Set the level in this block."""
    _wanted.append(wanted)
    try:
        yield
    finally:
        _wanted.pop()


def is_quiet() -> bool:
    """Whether progress and notices are left out."""
    return _wanted[-1] == QUIET


def is_verbose() -> bool:
    """Whether messages of other libraries are shown."""
    return _wanted[-1] == VERBOSE

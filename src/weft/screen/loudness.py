"""How much a person wants to see: results and errors only, what weft says, or what the libraries say too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

QUIET, NORMAL, VERBOSE = range(3)
_wanted = [NORMAL]  # by each command that runs, of which the last one counts


@contextmanager
def loudness(wanted: int) -> Iterator[None]:
    """Say so much meanwhile."""
    _wanted.append(wanted)
    try:
        yield
    finally:
        _wanted.pop()


def is_quiet() -> bool:
    """Whether progress and notices are left out."""
    return _wanted[-1] == QUIET


def is_verbose() -> bool:
    """Whether what other libraries say is let through."""
    return _wanted[-1] == VERBOSE

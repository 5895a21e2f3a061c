"""A sign of life while something takes long that cannot say how long."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weft.screen.loudness import is_quiet, is_verbose
from weft.screen.visible import say, visible

LONG = 10.0  # seconds
_LONGEST = 70  # characters of a line that can be erased: one that the terminal wraps cannot
_ERASE = "\r\x1b[K"


@contextmanager
def waiting(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Say on the standard error what is waited for.

    On a terminal at once, in a line that is gone afterwards; elsewhere, or where the libraries speak too, in a line
    that stays, after ten seconds.

    Args:
        what: is being done.
        hidden: say nothing, as all but one of several processes do.

    Example:
        >>> with waiting("loading my-model"):
        ...     model = AutoModelForCausalLM.from_pretrained("my-model")
    """
    line = f"{visible(what)[:_LONGEST]} ..."
    if hidden or is_quiet():
        yield
    elif sys.stderr.isatty() and not is_verbose():
        print(line, end="", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            print(_ERASE, end="", file=sys.stderr, flush=True)
    else:
        later = threading.Timer(LONG, say, [line, sys.stderr])
        later.daemon = True
        later.start()
        try:
            yield
        finally:
            later.cancel()
            later.join()  # or it is still there for a moment

"""Shows that a long operation of unknown length is running."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from weft.screen.loudness import is_quiet, is_verbose
from weft.screen.visible import say, visible

LONG = 10.0  # seconds
_LONGEST = 70  # characters of the line; a line that the terminal wraps cannot be erased
_ERASE = "\r\x1b[K"


@contextmanager
def waiting(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Print the name of a long operation to the standard error while it runs.

    On a terminal the line is printed at once, and erased at the end. Without a terminal or with `--verbose` it is
    printed after ten seconds, and stays.

    Args:
        what: name of the operation.
        hidden: print nothing; for all but one of several processes.

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
            later.join()  # so that the thread has ended

"""One thread at a time: a model's calls share the scalings that its layers follow, so two at once would mix them up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weft.errors import ThreadError

_KEY = "thread"


class OneThread:
    """Says which thread uses a model just now.

    Example:
        >>> thread = OneThread()
        >>> thread.claim()  # raises in another thread until
        >>> thread.release()
    """

    def __init__(self) -> None:
        # A dict, as `setdefault` is atomic; a lock could neither be copied nor pickled with the model.
        self._owner: dict[str, int] = {}
        self._blocks = 0

    def claim(self) -> None:
        """Take the model for this thread, which may have it already.

        Raises:
            ThreadError: another one is using it.
        """
        if torch.compiler.is_compiling():  # a graph has no threads; what calls it is seen where generation begins
            return
        own = threading.get_ident()
        owner = self._owner.setdefault(_KEY, own)
        if owner == own:
            return
        if owner not in sys._current_frames():  # it has ended in the midst of a call
            self._owner[_KEY] = own
            return
        raise ThreadError(
            f"the model is being used by another thread ({_name(owner)}), while {_name(own)} calls it: one thread at "
            "a time can use it, as its layers follow the scalings of one call. Put a lock around the calls, or load "
            "the mixture once for each thread (they can share a base model's memory only in turns)"
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether another thread has the model."""
        return (
            not torch.compiler.is_compiling() and self._owner.get(_KEY, threading.get_ident()) != threading.get_ident()
        )

    def release(self) -> None:
        """Let others have it, unless this thread is in a block that holds it."""
        if not self._blocks and not torch.compiler.is_compiling():
            self._owner.pop(_KEY, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this block, whatever it is, the model is this thread's.

        Raises:
            ThreadError: another one is using it.
        """
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Begin such a block.

        Raises:
            ThreadError: another one is using it.
        """
        self.claim()
        if not torch.compiler.is_compiling():
            self._blocks += 1

    def leave(self) -> None:
        """End such a block."""
        if not torch.compiler.is_compiling():
            self._blocks -= 1
            self.release()


def _name(ident: int) -> str:
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))

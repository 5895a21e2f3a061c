"""One thread at a time: the calls of a model share its carrier of scalings, so they must not run at the same time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from weft.errors import ThreadError

_KEY = "thread"


class OneThread:
    """The thread that uses a model at present.

    Example:
        >>> thread = OneThread()
        >>> thread.claim()  # from here on, claim() raises in other threads
        >>> thread.release()
    """

    def __init__(self) -> None:
        # A dict, as `setdefault` is atomic. A lock could not be copied or pickled with the model.
        self._owner: dict[str, int] = {}
        self._blocks = 0

    def claim(self) -> None:
        """Claim the model for this thread, which may have claimed it already.

        Raises:
            ThreadError: another thread is using it.
        """
        if torch.compiler.is_compiling():  # not possible in a graph; generate claims the model before it compiles
            return
        own = threading.get_ident()
        owner = self._owner.setdefault(_KEY, own)
        if owner == own:
            return
        if owner not in sys._current_frames():  # that thread has ended during a call
            self._owner[_KEY] = own
            return
        raise ThreadError(
            f"the model is being used by another thread ({_name(owner)}), while {_name(own)} calls it: one thread at "
            "a time can use it, as its layers follow the scalings of one call. Put a lock around the calls, or load "
            "the mixture once for each thread (they can share a base model's memory only in turns)"
        )

    @property
    def is_elsewhere(self) -> bool:
        """Whether another thread uses the model."""
        return (
            not torch.compiler.is_compiling() and self._owner.get(_KEY, threading.get_ident()) != threading.get_ident()
        )

    def release(self) -> None:
        """Release the model, unless this thread is in a `held` block."""
        if not self._blocks and not torch.compiler.is_compiling():
            self._owner.pop(_KEY, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """In this block, only this thread can use the model.

        Raises:
            ThreadError: another thread is using it.
        """
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        """Begin a `held` block.

        Raises:
            ThreadError: another thread is using the model.
        """
        self.claim()
        if not torch.compiler.is_compiling():
            self._blocks += 1

    def leave(self) -> None:
        """End a `held` block."""
        if not torch.compiler.is_compiling():
            self._blocks -= 1
            self.release()


def _name(ident: int) -> str:
    return next((thread.name for thread in threading.enumerate() if thread.ident == ident), str(ident))

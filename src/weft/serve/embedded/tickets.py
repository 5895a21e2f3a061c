"""A request on its way through the engine: who wants what, and whether anybody still waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from weft.serve.embedded.bodies import Wanted
from weft.serve.embedded.generating import Piece, Writing
from weft.serve.embedded.metrics import Metrics

# A piece; an error, after which nothing comes; None at the end.
Delivered = Piece | BaseException | None


@dataclass(eq=False)
class Ticket:
    """A request in the engine.

    Attributes:
        wanted: what it asks for.
        deliver: is given its pieces, and None or an error at the end, in the engine's threads.
    """

    wanted: Wanted
    deliver: Callable[[Delivered], None]
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)  # a function before Python 3.13, so no type
    _written: int = 0

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends at the next token."""
        self._over.set()

    @property
    def over(self) -> bool:
        """Whether nothing of it is to be done any more."""
        return self._over.is_set()

    def fail(self, err: BaseException) -> None:
        """Deliver an error, and nothing after it."""
        with self._lock:
            if not self.over:
                self.deliver(err)
                self.cancel()

    def written(self) -> None:
        """One more of its choices is."""
        with self._lock:
            self._written += 1
            if self._written == len(self.wanted.prompts) * self.wanted.n and not self.over:
                self.deliver(None)


@dataclass(eq=False)
class Task:
    """One choice of a request.

    Attributes:
        ticket: of the request.
        writing: its text.
        metrics: count what is done.
    """

    ticket: Ticket
    writing: Writing
    metrics: Metrics

    @property
    def over(self) -> bool:
        """Whether nothing of it is to be done any more."""
        return self.writing.finished or self.ticket.over

    def take(self, logits: Float[Tensor, "place vocab"], shares: dict[str, float] | None) -> None:
        """Go on by a token; whatever goes wrong is of this request alone.

        Args:
            logits: for `Writing.take`.
            shares: of the experts, where they are known.
        """
        try:
            tokens = self.writing.ids.shape[1]
            told = shares if self.ticket.wanted.choice.shares else None
            for piece in self.writing.take(logits, told):
                self.ticket.deliver(piece)
            self.metrics.generated(self.writing.ids.shape[1] - tokens)
            if self.writing.finished:
                self.ticket.written()
        except Exception as err:  # the threads of the engine go on with others
            self.ticket.fail(err)


def tasks_of(ticket: Ticket, tokenizer: Any, device: Any, penalty: float, metrics: Metrics) -> list[Task]:
    """The choices of a request.

    Args:
        ticket: of the request.
        tokenizer, device, penalty: of its writings.
        metrics: of its tasks.
    """
    number = len(ticket.wanted.prompts) * ticket.wanted.n
    return [Task(ticket, Writing(ticket.wanted, index, tokenizer, device, penalty), metrics) for index in range(number)]

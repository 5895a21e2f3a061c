"""The requests and their texts in the engine, with cancellation and delivery of results."""

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

# A piece; an error, which is the last one; None at the end.
Delivered = Piece | BaseException | None


@dataclass(eq=False)
class Ticket:
    """A request in the engine.

    Attributes:
        wanted: the request.
        deliver: called in the engine's threads with each piece, and at the end with None or an error.
    """

    wanted: Wanted
    deliver: Callable[[Delivered], None]
    _over: threading.Event = field(default_factory=threading.Event)
    _lock: Any = field(default_factory=threading.Lock)  # before Python 3.13, Lock is a function and not a type
    _written: int = 0

    def cancel(self) -> None:
        """Cancel the request: its texts end at the next token."""
        self._over.set()

    @property
    def over(self) -> bool:
        """Whether the request is cancelled or has failed."""
        return self._over.is_set()

    def fail(self, err: BaseException) -> None:
        """Deliver an error, and end the request."""
        with self._lock:
            if not self.over:
                self.deliver(err)
                self.cancel()

    def written(self) -> None:
        """One more choice is complete; after the last one, deliver the end."""
        with self._lock:
            self._written += 1
            if self._written == len(self.wanted.prompts) * self.wanted.n and not self.over:
                self.deliver(None)


@dataclass(eq=False)
class Task:
    """One choice of a request.

    Attributes:
        ticket: the ticket of the request.
        writing: the text of the choice.
        metrics: the counters.
    """

    ticket: Ticket
    writing: Writing
    metrics: Metrics

    @property
    def over(self) -> bool:
        """Whether the text is complete, or the request is cancelled or has failed."""
        return self.writing.finished or self.ticket.over

    def take(self, logits: Float[Tensor, "place vocab"], shares: dict[str, float] | None) -> None:
        """Generate one token, and deliver the new pieces. An error ends this request only.

        Args:
            logits: see `Writing.take`.
            shares: the experts' shares, or None.
        """
        try:
            tokens = self.writing.ids.shape[1]
            wanted = shares if self.ticket.wanted.choice.shares else None
            for piece in self.writing.take(logits, wanted):
                self.ticket.deliver(piece)
            self.metrics.generated(self.writing.ids.shape[1] - tokens)
            if self.writing.finished:
                self.ticket.written()
        except Exception as err:  # the engine's threads continue with other requests
            self.ticket.fail(err)


def tasks_of(ticket: Ticket, tokenizer: Any, device: Any, penalty: float, metrics: Metrics) -> list[Task]:
    """Make the tasks of a request, one for each choice.

    Args:
        ticket: the ticket of the request.
        tokenizer, device, penalty: see `Writing`.
        metrics: the counters.
    """
    number = len(ticket.wanted.prompts) * ticket.wanted.n
    return [Task(ticket, Writing(ticket.wanted, index, tokenizer, device, penalty), metrics) for index in range(number)]

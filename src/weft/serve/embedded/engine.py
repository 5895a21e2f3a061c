"""One thread uses the model: requests wait for their turn, and each is answered whole, piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from weft.errors import WeftError
from weft.serve.embedded.bodies import Wanted
from weft.serve.embedded.following import following
from weft.serve.embedded.generating import Piece, pieces
from weft.serve.embedded.metrics import Metrics

# A piece; an error, after which nothing comes; None at the end.
Delivered = Piece | BaseException | None


class Stopped(WeftError):
    """The engine has ended before the answer did."""


@dataclass(eq=False)
class Ticket:
    """A request in the engine.

    Attributes:
        wanted: what it asks for.
        deliver: called in the engine's thread.
    """

    wanted: Wanted
    deliver: Callable[[Delivered], None]
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends at the next token."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was."""
        return self._cancelled.is_set()


class Engine:
    """Answers requests, one after the other, in a thread of its own.

    Args:
        model: a mixture.
        tokenizer: the base model's.
        metrics: count what is done.

    Attributes:
        running: how many requests are being answered.

    Example:
        >>> engine = Engine(model, tokenizer, Metrics(["code", "law"]))
        >>> ticket = engine.submit(wanted, print)
        >>> engine.close()
    """

    def __init__(self, model: Any, tokenizer: Any, metrics: Metrics) -> None:
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self._waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="weft serve", daemon=True)
        self._thread.start()

    def submit(self, wanted: Wanted, deliver: Callable[[Delivered], None]) -> Ticket:
        """Let a request wait for its turn.

        Args:
            wanted: what it asks for.
            deliver: is given its pieces, and None or an error at the end, in the engine's thread.
        """
        ticket = Ticket(wanted, deliver)
        self._waiting.put(ticket)
        return ticket

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn."""
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        """Whether there is anybody who answers."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Begin no other answer, and end the present one at its next token; whoever waits is told."""
        self._stopped.set()
        self._waiting.put(None)

    def close(self) -> None:
        """Stop, and wait for it."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        while (ticket := self._waiting.get()) is not None:
            self.running = 1
            self._answer(ticket)
            self.running = 0
        while not self._waiting.empty():  # who came after the end was asked for
            if (ticket := self._waiting.get()) is not None:
                self._answer(ticket)

    def _answer(self, ticket: Ticket) -> None:
        try:
            with following(self.model, ticket.wanted.choice):
                for index in range(len(ticket.wanted.prompts) * ticket.wanted.n):
                    if not self._one(ticket, index):
                        return
            ticket.deliver(None)
        except Exception as err:  # of this request alone: the others go on
            ticket.deliver(err)

    def _one(self, ticket: Ticket, index: int) -> bool:
        """Whether a choice was written to its end."""
        if index % ticket.wanted.n == 0 and not ticket.cancelled:
            self.metrics.prompt(len(ticket.wanted.prompts[index // ticket.wanted.n].tokens))
        steps = pieces(self.model, self.tokenizer, ticket.wanted, index, self.metrics)
        while not ticket.cancelled:
            if self._stopped.is_set():
                raise Stopped("the server is shutting down")
            piece = next(steps, None)
            if piece is None:
                return True
            ticket.deliver(piece)
        return False

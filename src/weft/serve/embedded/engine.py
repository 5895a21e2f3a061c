"""The engine: one thread generates texts one after the other, and transformers' batches run between its steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import nn

from weft.base_model.devices import execution_device
from weft.errors import WeftError
from weft.generation.reader import Reader, tuner_of
from weft.serve.embedded.batching import Batch
from weft.serve.embedded.bodies import Wanted
from weft.serve.embedded.following import following
from weft.serve.embedded.metrics import Metrics
from weft.serve.embedded.tickets import Delivered, Task, Ticket, tasks_of


class Stopped(WeftError):
    """The engine was stopped before the answer was complete."""


class Engine:
    """Generates the texts of requests.

    Args:
        model: a mixture.
        tokenizer: the base model's tokenizer.
        metrics: the counters.

    Attributes:
        running: number of texts that are being generated.
        batch: generates several texts at once; None if all texts are generated one after the other.

    Example:
        >>> engine = Engine(model, tokenizer, Metrics(["code", "law"]))
        >>> ticket = engine.submit(wanted, print)
        >>> engine.close()
    """

    def __init__(self, model: Any, tokenizer: Any, metrics: Metrics) -> None:
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self._tuner = tuner_of(model)
        self._alone: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._writes = 0
        self.batch = Batch.where_exact(model, tokenizer, self._alone.put)
        self._tuner.backbone.base.register_forward_hook(self._count)
        self._thread = threading.Thread(target=self._run, name="weft serve", daemon=True)
        self._thread.start()

    def submit(self, wanted: Wanted, deliver: Callable[[Delivered], None]) -> Ticket:
        """Add a request to the queue or the batch.

        Args:
            wanted: the request.
            deliver: called in the engine's threads with each piece, and at the end with None or an error.

        Returns:
            The ticket, with which the request can be cancelled.
        """
        ticket = Ticket(wanted, deliver)
        if self._stopped.is_set():
            ticket.fail(Stopped("the server is shutting down"))
            return ticket
        base = self._tuner.backbone.base
        penalty = base.generation_config.repetition_penalty or 1.0
        for task in tasks_of(ticket, self.tokenizer, execution_device(base), penalty, self.metrics):
            if task.writing.index % wanted.n == 0:
                self.metrics.prompt(len(task.writing.prompt.tokens))
            if self.batch is None or not self.batch.add(task):
                self._alone.put(task)
        return ticket

    @property
    def running(self) -> int:
        """The number of texts that are being generated."""
        return self._writes + (0 if self.batch is None else self.batch.running)

    @property
    def waiting(self) -> int:
        """The number of texts in the queue."""
        return self._alone.qsize()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread is running."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """Begin no more texts, and end the present ones with an error at their next token."""
        self._stopped.set()
        if self.batch is not None:
            self.batch.stop(Stopped("the server is shutting down"))
        self._alone.put(None)

    def close(self) -> None:
        """Stop, and wait for the threads to end."""
        self.stop()
        self._thread.join()
        if self.batch is not None:
            self.batch.close()

    def _run(self) -> None:
        while (task := self._alone.get()) is not None:
            self._writes = 1
            self._write(task)
            self._writes = 0
        while not self._alone.empty():
            if (task := self._alone.get()) is not None:
                task.ticket.fail(Stopped("the server is shutting down"))

    def _write(self, task: Task) -> None:
        """Generate a text to its end; the batch can use the model between the steps."""
        try:
            reader = Reader(self.model, self._tuner.backbone.empty_cache())
            none = dict.fromkeys(self._tuner.xlora_config.expert_names or (), 0.0)
            while not task.over:
                if self._stopped.is_set():
                    raise Stopped("the server is shutting down")
                turn = nullcontext() if self.batch is None else self.batch.paused()
                with turn, following(self.model, task.ticket.wanted.choice):
                    logits, _ = reader.read(task.writing.ids, every_position=task.writing.wants_every_place)
                task.take(logits[0], reader.shares(0) or none)
        except Exception as err:  # ends this request only
            task.ticket.fail(err)

    def _count(self, base: nn.Module, args: Any, output: Any) -> None:
        """A hook after each call of the model: add the gate's shares to the metrics."""
        passes = self._tuner.passes
        if passes.gate_decides and not passes.carrier.in_scaling_pass and (followed := passes.followed()) is not None:
            self.metrics.decided(followed[0].mean(1))

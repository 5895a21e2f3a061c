"""What was done since the start, as Prometheus reads it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from weft.serve.prometheus import of_the_gate
from weft.serve.prometheus import written as in_prometheus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters that threads may share.

    Args:
        experts: their names, in the order of shares.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = tuple(experts)
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens = self._generated_tokens = self._gate_tokens = 0
        self._shares = torch.zeros(len(experts), dtype=torch.float64)

    def answered(self, path: str, status: int) -> None:
        """A request was answered."""
        with self._lock:
            self._answers[path, status] += 1

    def prompt(self, tokens: int) -> None:
        """A prompt of so many tokens was begun."""
        with self._lock:
            self._prompt_tokens += tokens

    def generated(self, tokens: int) -> None:
        """So many tokens were generated."""
        with self._lock:
            self._generated_tokens += tokens

    def decided(self, shares: Float[Tensor, "token expert"]) -> None:
        """The gate decided for tokens, with these shares."""
        with self._lock:
            self._shares += shares.double().sum(0).cpu()
            self._gate_tokens += len(shares)

    def written(self, *, running: int, waiting: int) -> str:
        """All of it, in Prometheus' text format.

        Args:
            running: texts that are being written.
            waiting: those that wait for their turn.
        """
        with self._lock:
            sums, tokens = self._shares.tolist(), self._gate_tokens
            answers = sorted(self._answers.items())
            prompt, generated = self._prompt_tokens, self._generated_tokens
        counted = [(f'{{path="{path}",status="{status}"}}', count) for (path, status), count in answers]
        return in_prometheus(
            [
                ("weft_requests_total", "counter", "Answered requests.", counted),
                ("weft_texts_running", "gauge", "Texts that are being written.", [("", running)]),
                ("weft_texts_waiting", "gauge", "Texts that wait for their turn.", [("", waiting)]),
                ("weft_prompt_tokens_total", "counter", "Tokens of prompts.", [("", prompt)]),
                ("weft_generation_tokens_total", "counter", "Generated tokens.", [("", generated)]),
                *of_the_gate(self.experts, sums, tokens),
            ]
        )

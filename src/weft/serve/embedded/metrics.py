"""The counters of the embedded engine, for Prometheus."""

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
    """Thread-safe counters.

    Args:
        experts: the experts' names, in the order of the shares.
    """

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts = tuple(experts)
        self._lock = threading.Lock()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._prompt_tokens = self._generated_tokens = self._gate_tokens = 0
        self._shares = torch.zeros(len(experts), dtype=torch.float64)

    def answered(self, path: str, status: int) -> None:
        """Count an answer."""
        with self._lock:
            self._answers[path, status] += 1

    def prompt(self, tokens: int) -> None:
        """Count the tokens of a prompt."""
        with self._lock:
            self._prompt_tokens += tokens

    def generated(self, tokens: int) -> None:
        """Count generated tokens."""
        with self._lock:
            self._generated_tokens += tokens

    def decided(self, shares: Float[Tensor, "token expert"]) -> None:
        """Count tokens for which the gate was used, with their shares."""
        with self._lock:
            self._shares += shares.double().sum(0).cpu()
            self._gate_tokens += len(shares)

    def written(self, *, running: int, waiting: int) -> str:
        """All metrics in Prometheus' text format.

        Args:
            running: number of texts that are being generated.
            waiting: number of texts in the queue.
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

"""A bounded record of the scalings that a model's passes used."""

from __future__ import annotations

from collections import deque

from jaxtyping import Float
from torch import Tensor


class ScalingsLog:
    """Keeps the last passes' scalings, detached and on the CPU, while it is enabled.

    Args:
        size: how many passes to keep; older ones are dropped.
    """

    def __init__(self, size: int) -> None:
        self.enabled = False
        self._entries: deque[Tensor] = deque(maxlen=size)

    def record(self, scalings: Float[Tensor, "batch seq layer expert"]) -> None:
        """Add one pass, if the log is enabled."""
        if self.enabled:
            # A copy: the scalings of a shared gate are a view that repeats one layer, and λ may be written to.
            self._entries.append(scalings.detach().to("cpu", copy=True).contiguous())

    def entries(self) -> list[Tensor]:
        """The recorded passes, oldest first; the list is a copy, the tensors are not."""
        return list(self._entries)

    def clear(self) -> None:
        """Forget all recorded passes."""
        self._entries.clear()

    def by_sequence_length(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Sequence length -> (indices in the log, scalings), so that each bucket can be stacked."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for index, scalings in enumerate(self._entries):
            _, seq, _, _ = scalings.shape
            indices, tensors = buckets.setdefault(seq, ([], []))
            indices.append(index)
            tensors.append(scalings)
        return buckets

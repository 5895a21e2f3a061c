"""A bounded log of the scalings of a model's passes."""

from __future__ import annotations

from collections import deque

from jaxtyping import Float
from torch import Tensor


class ScalingsLog:
    """Keeps the scalings of the last passes, detached and on the CPU, while it is enabled.

    Args:
        size: maximum number of passes; older ones are dropped.
    """

    def __init__(self, size: int) -> None:
        self.enabled = False
        self._entries: deque[Tensor] = deque(maxlen=size)

    def record(self, scalings: Float[Tensor, "batch seq layer expert"]) -> None:
        """Add one pass if the log is enabled."""
        if self.enabled:
            # A copy, as the scalings may be an expanded view of one layer, and users may write to λ.
            self._entries.append(scalings.detach().to("cpu", copy=True).contiguous())

    def entries(self) -> list[Tensor]:
        """The recorded passes, oldest first. The list is a copy, the tensors are not."""
        return list(self._entries)

    def clear(self) -> None:
        """Remove all recorded passes."""
        self._entries.clear()

    def by_sequence_length(self) -> dict[int, tuple[list[int], list[Tensor]]]:
        """Sequence length -> (indices in the log, scalings), so that the tensors of a length can be stacked."""
        buckets: dict[int, tuple[list[int], list[Tensor]]] = {}
        for index, scalings in enumerate(self._entries):
            _, seq, _, _ = scalings.shape
            indices, tensors = buckets.setdefault(seq, ([], []))
            indices.append(index)
            tensors.append(scalings)
        return buckets

"""The mean scalings of each sequence so far, which the layers use when the gate is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from weft.gate.losses import token_weights


class SequenceMeans:
    """The running mean of λ over the tokens of each sequence, without padding. Sums are in λ's dtype (float32).

    Args:
        length: number of earlier tokens, which are not in the mean.

    Attributes:
        length: number of tokens so far, with padding.
        frozen: whether the layers use the mean from here on.
    """

    def __init__(self, length: int = 0) -> None:
        self.length = length
        self.frozen = False
        self._sums: Tensor | None = None  # [batch, 1, layer, expert]
        self._counts: Tensor | None = None  # [batch, 1, 1, 1]

    def add(
        self, scalings: Float[Tensor, "batch seq layer expert"], padding: Shaped[Tensor, "batch total"] | None
    ) -> None:
        """Add tokens. The last `seq` columns of the attention mask `padding` are for these tokens."""
        self.length += scalings.shape[1]
        present = token_weights(scalings, padding)[..., None, None]  # [batch, seq, 1, 1]
        sums, counts = (scalings * present).sum(1, keepdim=True), present.sum(1, keepdim=True)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts is None else self._counts + counts

    def mean(self) -> Float[Tensor, "batch 1 layer expert"]:
        """The mean of each sequence, with one position for all tokens."""
        assert self._sums is not None
        assert self._counts is not None
        return self._sums / self._counts.clamp(min=1)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows, for example for beams; `change` maps a tensor with a batch axis."""
        if self._sums is not None and self._counts is not None:
            self._sums, self._counts = change(self._sums), change(self._counts)


def frozen_scalings_problems(after: Any, generation: dict[str, Any], *, gate_layer: int | None) -> list[str]:
    """Why scalings cannot be frozen after this number of new tokens, one sentence each.

    Args:
        after: `freeze_scalings_after`.
        generation: the other options of `generate`.
        gate_layer: the mixture's option.
    """
    problems = []
    if isinstance(after, bool) or not isinstance(after, int) or after < 0:
        problems.append(f"freeze_scalings_after ({after!r}) must be a whole number of at least 0")
    if gate_layer is not None:
        problems.append(
            f"freeze_scalings_after ({after!r}) saves nothing with gate_layer ({gate_layer}), which has one pass "
            "anyway: leave it out"
        )
    for name in ("assistant_model", "prompt_lookup_num_tokens", "speculate"):
        if generation.get(name) is not None:
            problems.append(f"freeze_scalings_after ({after!r}) and {name} exclude each other: leave one out")
    if generation.get("use_cache") is False:
        problems.append(f"freeze_scalings_after ({after!r}) needs a cache: leave use_cache (False) out")
    return problems

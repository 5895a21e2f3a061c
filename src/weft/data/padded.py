"""Sequences of tokens as rectangular batches, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

Batch = tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]


def padded(sequences: Sequence[Sequence[int] | Tensor]) -> Batch:
    """(input_ids, attention_mask) of these sequences, padded with zeros to the longest."""
    rows = [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(masks, batch_first=True)


def padded_batches(sequences: Sequence[Sequence[int]], batch_size: int) -> Iterator[Batch]:
    """Yield `padded` of each `batch_size` sequences, in their order."""
    for start in range(0, len(sequences), batch_size):
        yield padded(sequences[start : start + batch_size])

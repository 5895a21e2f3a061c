"""Orders rows and collates them into batches of tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from weft.data.texts import NO_LABEL
from weft.gate.losses import NO_EXPERT


class RowCollator:
    """Collates rows into a batch. Columns are padded on the right, as positions are counted from a row's first token.

    A row has `input_ids` and `labels`. All rows of a batch, or none, have `expert_labels`; the same for `position_ids`.
    Rows with `position_ids` contain several texts (see `weft.data.packing`): they get no attention mask, and each
    padding token is a separate text, at position 0.

    Args:
        pad_token_id: padding of `input_ids`.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._padding = {
            "input_ids": pad_token_id,
            "labels": NO_LABEL,
            "position_ids": 0,
            "expert_labels": NO_EXPERT,
            "attention_mask": 0,
        }

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch; each tensor is `[row, longest]`."""
        if "position_ids" not in rows[0]:
            rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        longest = max(len(row["input_ids"]) for row in rows)
        return {
            name: torch.tensor([[*row[name], *[padding] * (longest - len(row[name]))] for row in rows])
            for name, padding in self._padding.items()
            if name in rows[0]
        }


class RowsAndABlank(Dataset):
    """The rows of a data set, followed by a blank row, which fills up batches and has no labels.

    The blank row is a copy of the shortest row without its labels, so that every collator accepts it (for packed rows,
    for a scaling pass from a cache).

    Args:
        rows: rows with `input_ids` and `labels`.
    """

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows
        shortest = min(rows, key=lambda row: len(row["input_ids"]))
        without: dict[str, Any] = {"labels": [NO_LABEL] * len(shortest["input_ids"])}
        if "expert_labels" in shortest:
            without["expert_labels"] = [NO_EXPERT] * len(shortest["input_ids"])
        self.blank = {**shortest, **without}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index < len(self.rows) else self.blank


class FullBatches(Sampler[int]):
    """Samples all rows in an order of seed and epoch, then the blank row until the last batch is full.

    The batches of all processes are full then, so that accelerate repeats no rows, and the gradients are the same as
    with one process.

    Args:
        num_rows: number of rows without the blank one, whose index is `num_rows`.
        multiple: the number of indices is a multiple of this.
        seed: random seed of the order.
        lengths: lengths of the rows, to group rows of similar length; None for a random order.
        group_size: number of rows in such a group.
    """

    def __init__(
        self, num_rows: int, multiple: int, seed: int, *, lengths: list[int] | None = None, group_size: int = 1
    ) -> None:
        self.num_rows = num_rows
        self.multiple = multiple
        self.seed = seed
        self.lengths = lengths
        self.group_size = group_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_rows // self.multiple) * self.multiple

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            yield from torch.randperm(self.num_rows, generator=generator).tolist()
        else:
            yield from get_length_grouped_indices(self.lengths, self.group_size, generator=generator)
        yield from [self.num_rows] * (len(self) - self.num_rows)

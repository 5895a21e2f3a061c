"""Packs several texts into one row of a batch, in which they do not see each other.

Each text of a row begins at 0 in `position_ids`. There is no attention mask: without one, transformers makes a mask
from the position ids, for full and for sliding attention. Whether a model really separates the texts depends on its
architecture and its attention implementation: see `weft.train.packing_check`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from weft.data.texts import NO_LABEL


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute texts over rows (best fit, decreasing), and return the indices of the texts in each row.

    Args:
        lengths: number of tokens of each text, at most `capacity`.
        capacity: maximum number of tokens per row.
    """
    rows: list[list[int]] = []
    by_room: list[tuple[int, int]] = []  # (tokens that still fit, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        best = bisect.bisect_left(by_room, (lengths[index], -1))
        if best < len(by_room):
            room, row = by_room.pop(best)
            rows[row].append(index)
        else:
            room, row = capacity, len(rows)
            rows.append([index])
        bisect.insort(by_room, (room - lengths[index], row))
    return rows


def packed_rows(examples: Sequence[dict[str, Any]], capacity: int) -> list[dict[str, list[int]]]:
    """Pack examples into rows. The first token of each text has the label -100, as nothing precedes it.

    Args:
        examples: one text each, with `input_ids`, with `labels` if they differ from these, and (all or none) with
            `expert_labels`, one for each token.
        capacity: maximum number of tokens per row.
    """
    rows = []
    for indices in pack([len(example["input_ids"]) for example in examples], capacity):
        texts = [list(examples[index]["input_ids"]) for index in indices]
        row = {
            "input_ids": [token for text in texts for token in text],
            "labels": [label for index in indices for label in [NO_LABEL, *_labels(examples[index])[1:]]],
            "position_ids": [position for text in texts for position in range(len(text))],
        }
        if "expert_labels" in examples[0]:
            row["expert_labels"] = [label for index in indices for label in examples[index]["expert_labels"]]
        rows.append(row)
    return rows


def _labels(example: dict[str, Any]) -> list[int]:
    return list(example.get("labels", example["input_ids"]))

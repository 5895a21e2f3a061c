"""Training rows from files, labelled by the expert that a file is named for. It knows nothing of models."""

from __future__ import annotations

from typing import Any

from weft.data import read_texts, token_sequences
from weft.losses import NO_EXPERT


def labelled_source(value: str, expert_names: list[str]) -> tuple[str, int]:
    """ "math=a.jsonl" as the file and the number of the expert "math"; -100 where no expert is named.

    A name is only an expert's, so that other paths may hold an "=".
    """
    name, equals, source = value.partition("=")
    if equals and name in expert_names:
        return source, expert_names.index(name)
    return value, NO_EXPERT


def training_rows(values: list[str], expert_names: list[str], tokenizer: Any, length: int) -> list[dict[str, Any]]:
    """The token sequences of all sources as rows for a Trainer, with the label of each where there is one.

    Raises:
        DataError: a source cannot be read or holds nothing to learn from.
    """
    rows = []
    labelled = any(labelled_source(value, expert_names)[1] != NO_EXPERT for value in values)
    for value in values:
        source, label = labelled_source(value, expert_names)
        for sequence in token_sequences(read_texts(source, tokenizer), tokenizer, length):
            row: dict[str, Any] = {"input_ids": sequence, "labels": sequence}
            rows.append({**row, "expert_labels": label} if labelled else row)
    return rows


def label_problems(values: list[str], expert_names: list[str], weight: float) -> list[str]:
    """What is wrong with the weight of the loss from labels, given the sources."""
    if weight and not any(labelled_source(value, expert_names)[1] != NO_EXPERT for value in values):
        return [
            f"expert_label_loss_weight ({weight}) needs data that is named for an expert ({expert_names}): name=FILE"
        ]
    return []

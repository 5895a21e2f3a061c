"""Texts labelled by the expert that they, or parts of them, belong to.

A file that is named for an expert (math=a.jsonl) labels its texts; a row's "expert" labels that text, and its "experts"
([[start, name], ...], from which character on) the text's parts.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from weft.data.texts import NO_LABEL, assistant_labels, check_sequence_length, read_rows, row_tokens
from weft.errors import DataError
from weft.files.names import split_name
from weft.files.reading import shown
from weft.gate.losses import NO_EXPERT


def labelled_source(value: str, expert_names: Sequence[str]) -> tuple[str, str | None]:
    """ "math=a.jsonl" as the file and the expert "math"; None where no expert is named.

    A name is only an expert's, so that other paths may hold an "=".
    """
    name, source = split_name(value)
    return (source, name) if name in expert_names else (value, None)


def training_rows(
    values: Sequence[str],
    expert_names: Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    labelled: bool,
    assistant_only_loss: bool = False,
) -> list[dict[str, Any]]:
    """The token sequences of all sources as rows for a Trainer.

    Args:
        values: the sources, of which some may be named for an expert.
        expert_names: in the order of their numbers.
        tokenizer: the base model's.
        length: tokens of a row at most; a rest of one token is dropped.
        labelled: give each token the number of its expert, -100 for none, as `expert_labels`.
        assistant_only_loss: `labels` are -100 but for the assistant's turns; rows without a label to learn from are
            dropped.

    Raises:
        DataError: a source cannot be read or holds nothing to learn from, or labels are asked for and there are none.
    """
    rows: list[dict[str, Any]] = []
    for value in values:
        source, name = labelled_source(value, expert_names)
        rows += _source_rows(
            source, name, expert_names if labelled else None, tokenizer, length, assistant_only_loss=assistant_only_loss
        )
    if labelled and all(label == NO_EXPERT for row in rows for label in row["expert_labels"]):
        raise DataError(
            f"expert_label_loss_weight and gate_start (labels) need labels, and data ({', '.join(values)}) names none "
            f'of the experts {list(expert_names)}: name a file for one (name=FILE), or rows, by "expert" or "experts"'
        )
    return rows


def tokens_and_parts(row: Any, place: str, tokenizer: Any, default: Any) -> tuple[list[int], list[int], list[Any]]:
    """A row's tokens, none where its text is blank, the part of each, and the parts' labels as they stand in the row.

    Args:
        row: as it was read.
        place: of the row, for messages.
        tokenizer: the base model's.
        default: the label where the row has none.

    Raises:
        DataError: the row cannot be read, "experts" is no list of parts, or of a row without "text", or the tokenizer
            does not know which characters its tokens are.
    """
    tokens = row_tokens(row, place, tokenizer)
    spans = row.get("experts")
    if spans and not isinstance(row.get("text"), str):
        raise DataError(f'{place}: "experts" counts the characters of "text", which is not there: name one "expert"')
    if not spans or not tokens:
        # Tables have null where a row has no value.
        return tokens, [0] * len(tokens), [default if row.get("expert") is None else row["expert"]]
    try:
        starts, names = zip(*spans, strict=True)
        ordered = starts[0] == 0 and list(starts) == sorted(set(starts))
    except (TypeError, ValueError):
        ordered = False
    if not ordered:
        raise DataError(
            f'{place}: "experts" ({shown(spans)}) must be [[start, name], ...] in order, the first from 0 on'
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f'{place}: "experts" needs a tokenizer that knows its tokens\' places (a "fast" one)')
    offsets = tokenizer(row["text"], verbose=False, return_offsets_mapping=True)["offset_mapping"]
    # A special token behind the text says that it is at 0: it belongs to the part before it.
    parts = accumulate((bisect_right(starts, start) - 1 for start, _ in offsets), max)
    return tokens, list(parts), list(names)


def labelled_tokens(
    row: Any, place: str, tokenizer: Any, expert_names: Sequence[str], default: str | None = None
) -> tuple[list[int], list[int]]:
    """A row's tokens, none where its text is blank, and the number of each one's expert, -100 for none.

    Args:
        row: as it was read.
        place: of the row, for messages.
        tokenizer: the base model's.
        expert_names: in the order of their numbers.
        default: the label where the row has none.

    Raises:
        DataError: as `tokens_and_parts`, or a label is no expert's name.
    """
    tokens, parts, names = tokens_and_parts(row, place, tokenizer, default)
    numbers = _numbers(names, expert_names, place)
    return tokens, [numbers[part] for part in parts]


def _source_rows(
    source: str,
    default: str | None,
    expert_names: Sequence[str] | None,
    tokenizer: Any,
    length: int,
    *,
    assistant_only_loss: bool,
) -> list[dict[str, Any]]:
    """The rows of one source, with `expert_labels` where there are names of experts."""
    check_sequence_length(length)
    rows = []
    for place, row in read_rows(source):
        columns = {}
        if expert_names is None:
            tokens = row_tokens(row, place, tokenizer)
        else:
            tokens, columns["expert_labels"] = labelled_tokens(row, place, tokenizer, expert_names, default)
        labels = assistant_labels(tokens, row, place, tokenizer) if tokens and assistant_only_loss else tokens
        columns |= {"input_ids": tokens, "labels": labels}
        for start in range(0, len(tokens) - 1, length):
            cut = {name: values[start : start + length] for name, values in columns.items()}
            if any(label != NO_LABEL for label in cut["labels"][1:]):  # nothing predicts the first
                rows.append(cut)
    if not rows:
        behind = ", with one of the assistant's behind the first" if assistant_only_loss else ""
        raise DataError(f"data ({source}) holds no text of two tokens or more{behind}")
    return rows


def _numbers(names: Sequence[Any], expert_names: Sequence[str], place: str) -> list[int]:
    """The parts' labels as numbers."""
    unknown = [name for name in names if name is not None and name not in expert_names]
    if unknown:
        raise DataError(
            f"{place}: the label {shown(unknown[0])} must be one of the experts {list(expert_names)}, or null for none"
        )
    return [NO_EXPERT if name is None else list(expert_names).index(name) for name in names]

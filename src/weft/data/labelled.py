"""Texts labelled with the expert to which they, or parts of them, belong.

An expert's name before a file (math=a.jsonl) labels all its texts. A row's "expert" labels its text. A row's "experts"
([[start, name], ...]; start is the index of a character) labels the parts of its text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from weft.data.texts import NO_LABEL, assistant_labels, read_each, read_rows, row_tokens
from weft.data.windows import check_sequence_length, opening_length, opening_of, spans, window
from weft.errors import DataError
from weft.files.names import split_name
from weft.files.reading import shown
from weft.gate.losses import NO_EXPERT


def labelled_source(value: str, expert_names: Sequence[str]) -> tuple[str, str | None]:
    """Split "math=a.jsonl" into the file and the expert "math"; the expert is None if none is named.

    Only names of experts are split off, as paths can contain "=".
    """
    name, source = split_name(value)
    return (source, name) if name in expert_names else (value, None)


def training_rows(
    values: Sequence[str],
    expert_names: Sequence[str],
    tokenizer: Any,
    length: int,
    *,
    labelled: bool | None,
    assistant_only_loss: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Read all sources and return their token sequences as rows for a Trainer, each with the `place` of its text.

    Args:
        values: the sources, SOURCE or EXPERT=SOURCE.
        expert_names: the experts in the order of their numbers.
        tokenizer: the base model's tokenizer.
        length: maximum number of tokens per row, see `weft.data.windows`; a row of one token is dropped.
        labelled: add `expert_labels`, the number of each token's expert, -100 for none. With None only if they are
            complete (`labels_are_complete`).
        assistant_only_loss: set `labels` outside of the assistant's turns to -100, and drop rows without labels.
        say: called with a line for each source with labels that are wrong, and not needed.

    Raises:
        DataError: a source cannot be read or has no usable row; or `labelled` is set and there are no labels.
    """

    def rows_of(value: str) -> list[dict[str, Any]]:
        source, name = labelled_source(value, expert_names)
        return _source_rows(
            source,
            name,
            None if labelled is False else expert_names,
            tokenizer,
            length,
            needed=bool(labelled),
            assistant_only_loss=assistant_only_loss,
            say=say,
        )

    rows = [row for found in read_each(values, rows_of) for row in found]
    if labelled is None and not labels_are_complete(rows, len(expert_names)):
        for row in rows:
            row.pop("expert_labels", None)
    if labelled and all(label == NO_EXPERT for row in rows for label in row["expert_labels"]):
        raise DataError(
            f"expert_label_loss_weight and gate_start (labels) need labels, and data ({', '.join(values)}) names none "
            f'of the experts {list(expert_names)}: name a file for one (name=FILE), or rows, by "expert" or "experts"'
        )
    return rows


def labels_are_complete(rows: Sequence[Mapping[str, Any]], num_experts: int) -> bool:
    """Whether each token of these rows is labelled with an expert, and each expert is a label."""
    found: set[int] = set()
    for row in rows:
        found.update(row.get("expert_labels", [NO_EXPERT]))
        if NO_EXPERT in found:
            return False
    return len(found) == num_experts


def tokens_and_parts(row: Any, place: str, tokenizer: Any, default: Any) -> tuple[list[int], list[int], list[Any]]:
    """Return a row's token ids (empty for a blank text), the part of each token, and the label of each part.

    Args:
        row: the row of the data file.
        place: place of the row, for messages.
        tokenizer: the base model's tokenizer.
        default: label of a row without one.

    Raises:
        DataError: the row cannot be read, "experts" is not a list of parts, the row has "experts" but no "text", or the
            tokenizer has no character offsets.
    """
    tokens = row_tokens(row, place, tokenizer)
    spans = row.get("experts")
    if spans and not isinstance(row.get("text"), str):
        raise DataError(f'{place}: "experts" counts the characters of "text", which is not there: name one "expert"')
    if not spans or not tokens:
        # Tables have null for a missing value.
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
    # A special token after the text has the offset 0, but belongs to the last part.
    parts = accumulate((bisect_right(starts, start) - 1 for start, _ in offsets), max)
    return tokens, list(parts), list(names)


def labelled_tokens(
    row: Any, place: str, tokenizer: Any, expert_names: Sequence[str], default: str | None = None
) -> tuple[list[int], list[int]]:
    """Return a row's token ids (empty for a blank text) and the number of each token's expert, -100 for none.

    Args:
        row: the row of the data file.
        place: place of the row, for messages.
        tokenizer: the base model's tokenizer.
        expert_names: the experts in the order of their numbers.
        default: label of a row without one.

    Raises:
        DataError: as for `tokens_and_parts`, or a label is not the name of an expert.
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
    needed: bool,
    assistant_only_loss: bool,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """The rows of one source. With `expert_names` they have `expert_labels`, all of them or (not `needed`) some."""
    check_sequence_length(length)
    rows, wrong, opening = [], "", opening_of(tokenizer)
    for place, row in read_rows(source):
        columns = {}
        try:
            if expert_names is not None:
                tokens, columns["expert_labels"] = labelled_tokens(row, place, tokenizer, expert_names, default)
        except DataError as err:
            if needed:
                raise
            wrong = wrong or str(err)
        if not columns:
            tokens = row_tokens(row, place, tokenizer)
        labels = assistant_labels(tokens, row, place, tokenizer) if tokens and assistant_only_loss else tokens
        columns |= {"input_ids": tokens, "labels": labels}
        for cut in labelled_windows(columns, length, opening):
            if any(label != NO_LABEL for label in cut["labels"][1:]):  # the first token is not predicted
                rows.append({**cut, "place": place})
    if wrong:
        say(f"labels are left out: {wrong}")
    if not rows:
        after = ", with one of the assistant's after the first" if assistant_only_loss else ""
        raise DataError(f"data ({source}) holds no text of two tokens or more{after}")
    return rows


def labelled_windows(
    columns: dict[str, list[int]], length: int, opening: Sequence[int]
) -> Iterator[dict[str, list[int]]]:
    """The windows of a text with labels, see `weft.data.windows`.

    Args:
        columns: `input_ids`, and what else there is for each token.
        length: maximum number of tokens in a window.
        opening: the tokens with which each window begins. They have the expert of the token after them, and are
            trained on only in the first window.
    """
    before = opening_length(columns["input_ids"], opening)
    for start, end in spans(len(columns["input_ids"]), length, before):
        cut = {name: window(values, start, end, before) for name, values in columns.items()}
        if start and "expert_labels" in columns:
            cut["expert_labels"][:before] = [columns["expert_labels"][start]] * before
        if start and "labels" in columns:
            cut["labels"][:before] = [NO_LABEL] * before
        yield cut


def _numbers(names: Sequence[Any], expert_names: Sequence[str], place: str) -> list[int]:
    """The parts' labels as numbers."""
    unknown = [name for name in names if name is not None and name not in expert_names]
    if unknown:
        raise DataError(
            f"{place}: the label {shown(unknown[0])} must be one of the experts {list(expert_names)}, or null for none"
        )
    return [NO_EXPERT if name is None else list(expert_names).index(name) for name in names]

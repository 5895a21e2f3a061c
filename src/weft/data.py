"""Texts from files, and token sequences from texts. It knows nothing of models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from weft.errors import DataError, first_line

_LINES = {".jsonl", ".json", ".ndjson"}
_FILES = {*_LINES, ".parquet", ".txt", ".md"}
# Windows editors put a byte order mark first.
_ENCODING = "utf-8-sig"


def read_texts(source: str, tokenizer: Any) -> list[str]:
    """All texts of one source.

    Args:
        source: a .jsonl file with "text" or "messages" in each line, a .parquet file with such a column, any other
            file as one plain text, or the name or folder of a data set of the `datasets` library (its split "train").
        tokenizer: turns "messages" into a text by its chat template.

    Raises:
        DataError: nothing is there, it cannot be read (which line, and why), or it holds no text.
    """
    texts = [row_text(row, place, tokenizer) for place, row in read_rows(source)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise DataError(f"data ({source}) holds no text")
    return texts


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """All rows of one source as they stand in it, each with its place, for messages.

    Args:
        source: as for `read_texts`; a plain text is one row, {"text": ...}.

    Raises:
        DataError: nothing is there, or it cannot be read (which line, and why).
    """
    path = Path(source)
    if path.is_file():
        if path.suffix in _LINES:
            yield from _json_lines(path)
        elif path.suffix == ".parquet":
            yield from _data_set_rows("parquet", source, data_files=source)
        else:
            yield str(path), {"text": _plain_text(path)}
    elif not path.is_dir() and (path.suffix in _FILES or path.is_absolute()):
        raise DataError(f"data ({source}) is not a file: give .jsonl, .parquet or text files, or a data set's name")
    else:
        yield from _data_set_rows(source, source)


def token_sequences(texts: Iterable[str], tokenizer: Any, length: int) -> list[list[int]]:
    """Each text as consecutive sequences of at most `length` tokens; a rest of one token is dropped.

    Raises:
        DataError: `length` leaves nothing to predict, or no text has two tokens.
    """
    check_sequence_length(length)
    sequences = []
    for text in texts:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        sequences += [tokens[start : start + length] for start in range(0, len(tokens), length)]
    sequences = [sequence for sequence in sequences if len(sequence) > 1]
    if not sequences:
        raise DataError("the data holds no text of two tokens or more")
    return sequences


def check_sequence_length(length: int) -> None:
    """Raise where sequences of this length leave nothing to predict.

    Raises:
        DataError: `length` is below 2.
    """
    if length < 2:
        raise DataError(f"sequence_length ({length}) must be at least 2: one token to read, one to predict")


def check_length(length: int, model_config: Any) -> None:
    """Raise where the model cannot read sequences of this length.

    Raises:
        DataError: `length` is above the model's number of positions.
    """
    most = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise DataError(f"sequence_length ({length}) must be at most the model's number of positions ({most})")


def named_sources(values: list[str]) -> dict[str, str]:
    """["math=a.jsonl", "b.jsonl"] as {name: source}; a source without a name has its file's.

    Raises:
        DataError: two sources have one name.
    """
    sources: dict[str, str] = {}
    for value in values:
        name, equals, source = value.partition("=")
        if not equals or "/" in name:  # the "=" of a path is none of ours
            name, source = Path(value).stem, value
        if not name or not source:
            raise DataError(f"data ({value}) must be name=FILE or FILE")
        if name in sources:
            raise DataError(f"data names {name!r} twice ({sources[name]} and {source}): give each a name, name=FILE")
        sources[name] = source
    return sources


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    # Split at line feeds only: JSON strings may hold the other characters that str.splitlines splits at.
    for number, line in enumerate(_plain_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                yield place, json.loads(line)
            except ValueError as err:
                raise DataError(f"{place}: no valid JSON ({err}); expected one object per line") from err


def row_text(row: Any, place: str, tokenizer: Any) -> str:
    """The text of one row.

    Raises:
        DataError: it has none.
    """
    if isinstance(row, dict):
        if isinstance(row.get("text"), str):
            return row["text"]
        if isinstance(row.get("messages"), list):
            if getattr(tokenizer, "chat_template", None) is None:
                raise DataError(f'{place}: has "messages", but the base model\'s tokenizer has no chat template')
            try:
                return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
            except Exception as err:  # whatever the template, which is a program of its own, raises
                raise DataError(f"{place}: the chat template refuses its messages: {first_line(err)}") from err
    found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise DataError(f'{place}: found {found}, expected an object with "text" (a string) or "messages" (a list)')


def _plain_text(path: Path) -> str:
    try:
        return path.read_text(encoding=_ENCODING)
    except UnicodeDecodeError as err:
        raise DataError(f"{path} is no UTF-8 text ({err.reason} at byte {err.start})") from err


def _data_set_rows(kind: str, source: str, **options: Any) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(kind, split="train", **options)
    except Exception as err:  # the library raises many kinds, its own and those of its readers
        raise DataError(f"data ({source}) cannot be read as a data set: {first_line(err)}") from err
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows))

"""Rows from files, and tokens from rows: the one place where a text or a conversation becomes tokens.

It knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from weft.data.chat_template import assistant_mask, check_messages, conversation_tokens, refuse_half_characters
from weft.data.tables import table_rows
from weft.errors import DataError, first_line
from weft.files.names import split_name
from weft.files.presence import EXPECTED, LINES, TABLES, source_problem
from weft.files.reading import parse_json, read_text, shown

# Windows editors put a byte order mark first.
_ENCODING = "utf-8-sig"
# The label of a token that counts in no loss, as in transformers.
NO_LABEL = -100


def read_tokens(source: str, tokenizer: Any) -> list[list[int]]:
    """The tokens of each text or conversation of one source.

    Args:
        source: a .jsonl file with "text" or "messages" in each line, a .json file of the same or with a list of such
            objects, a .parquet file with such a column, a .csv or .tsv file with a column "text", any other file as one
            plain text, or the name or folder of a data set of the `datasets` library (its split "train").
        tokenizer: the base model's.

    Raises:
        DataError: nothing is there, it cannot be read (which line, and why), or it holds no text.
    """
    found = [row_tokens(row, place, tokenizer) for place, row in read_rows(source)]
    found = [tokens for tokens in found if tokens]
    if not found:
        raise DataError(f"data ({source}) holds no text")
    return found


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """All rows of one source as they stand in it, each with its place, for messages.

    Args:
        source: as for `read_tokens`; a plain text is one row, {"text": ...}.

    Raises:
        DataError: nothing is there, or it cannot be read (which line, and why).
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if (problem := source_problem("data", source)) is not None:
        raise DataError(problem)
    if os.path.isfile(path):
        if suffix in LINES:
            yield from _json_rows(path)
        elif suffix in TABLES:
            yield from table_rows(path, _plain_text(path), TABLES[suffix])
        elif suffix == ".parquet":
            yield from _data_set_rows("parquet", source, data_files=source)
        else:
            yield str(path), {"text": _one_text(path)}
    else:
        yield from _data_set_rows(source, source)


def token_sequences(texts: Iterable[list[int]], length: int) -> list[list[int]]:
    """The tokens of each text as consecutive sequences of at most `length`; a rest of one token is dropped.

    Raises:
        DataError: `length` leaves nothing to predict, or no text has two tokens.
    """
    check_sequence_length(length)
    sequences = []
    for tokens in texts:
        sequences += [tokens[start : start + length] for start in range(0, len(tokens) - 1, length)]
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
    most = num_positions(model_config)
    if most is not None and length > most:
        raise DataError(f"sequence_length ({length}) must be at most the model's number of positions ({most})")


def num_positions(model_config: Any) -> int | None:
    """How many tokens a model can read at once; None where its config sets no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def named_sources(values: list[str]) -> dict[str, str]:
    """["math=a.jsonl", "b.jsonl"] as {name: source}; a source without a name has its file's.

    Raises:
        DataError: two sources have one name.
    """
    sources: dict[str, str] = {}
    for value in values:
        name, source = split_name(value)
        if name is None or "/" in name:  # the "=" of a path is none of ours
            name, source = Path(value).stem, value
        if not name or not source:
            raise DataError(f"data ({value}) must be name=FILE or FILE")
        if name in sources:
            raise DataError(f"data names {name!r} twice ({sources[name]} and {source}): give each a name, name=FILE")
        sources[name] = source
    return sources


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """An object per line; of a .json file that begins as a list, its items."""
    text = _plain_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except ValueError as err:
            raise DataError(f"{path}: no valid JSON ({err}); expected one object per line, or a list of them") from err
        yield from ((f"{path}, item {number}", row) for number, row in enumerate(items))
        return
    # Split at line feeds only: JSON strings may hold the other characters that str.splitlines splits at.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except ValueError as err:
                raise DataError(f"{place}: no valid JSON ({err}); expected one object per line") from err
            yield place, row


def _one_text(path: Path) -> str:
    """A file that is one plain text.

    Raises:
        DataError: it is none: other bytes, or the lines of a .jsonl file.
    """
    text = _plain_text(path)
    if "\0" in text:
        raise DataError(f"data ({path}) is no text, as it holds null characters: expected {EXPECTED}, in UTF-8")
    if _is_row(text.lstrip().partition("\n")[0]):
        raise DataError(f"data ({path}) holds an object per line, and would be read as one text: name it .jsonl")
    return text


def _is_row(line: str) -> bool:
    try:
        row = parse_json(line) if line.startswith("{") else None
    except ValueError:
        return False
    return isinstance(row, dict) and ("text" in row or "messages" in row)


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text, with what the tokenizer puts before and behind one.

    Raises:
        DataError: the text is none (see `refuse_half_characters`).
    """
    refuse_half_characters(text)
    return list(tokenizer(text, verbose=False)["input_ids"])


def prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that goes on: without what the tokenizer puts behind one that is complete.

    Raises:
        DataError: the text is none (see `refuse_half_characters`).
    """
    refuse_half_characters(text)
    encoded = tokenizer(text, verbose=False, return_special_tokens_mask=True)
    tokens, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while 0 in added and added[-1]:
        added.pop()
    return tokens[: len(added)]


def row_tokens(row: Any, place: str, tokenizer: Any) -> list[int]:
    """The tokens of one row; none where its text is blank.

    Args:
        row: an object with "text", or with "messages", which the tokenizer's chat template renders; "tools" (a list,
            or JSON) and "chat_template_kwargs" (an object) are handed to it.
        place: of the row, for messages.
        tokenizer: the base model's.

    Raises:
        DataError: it has neither, or the template cannot render it.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return at_place(place, text_tokens, row["text"], tokenizer) if row["text"].strip() else []
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _conversation(row, "messages", place, tokenizer, conversation_tokens)
    found = f"the keys {shown(sorted(row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise DataError(f'{place}: found {found}, expected an object with "text" (a string) or "messages" (a list)')


def row_prompt_tokens(row: dict[str, Any], place: str, tokenizer: Any) -> list[int]:
    """The tokens of a row's "prompt", a text that goes on, or messages that are to be answered.

    Raises:
        DataError: the chat template cannot render the messages, or they are answered already.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return at_place(place, prompt_tokens, prompt, tokenizer)
    tokens = _conversation(row, "prompt", place, tokenizer, partial(conversation_tokens, add_generation_prompt=True))
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{place}: the prompt ends with a turn of the assistant, expected one to be answered")
    return tokens


def assistant_labels(tokens: list[int], row: dict[str, Any], place: str, tokenizer: Any) -> list[int]:
    """A row's tokens where they are of the assistant's turns, -100 in the place of the others.

    Args:
        tokens: of `row_tokens`.
        row: as it was read.
        place: of the row, for messages.
        tokenizer: the base model's.

    Raises:
        DataError: the row has no "messages", or it cannot be told which tokens are the assistant's, or none are.
    """
    if isinstance(row.get("text"), str):
        raise DataError(
            f'{place}: has "text", in which no turn is the assistant\'s: assistant_only_loss (True) needs rows with '
            '"messages"'
        )
    mask = _conversation(row, "messages", place, tokenizer, assistant_mask)
    if not any(mask):
        roles = ", ".join(message["role"] for message in row["messages"])
        raise DataError(
            f"{place}: assistant_only_loss (True) needs tokens of the assistant's, and the chat template gives none in "
            f"this conversation ({roles}): leave it out"
        )
    return [token if is_assistant else NO_LABEL for token, is_assistant in zip(tokens, mask, strict=True)]


def at_place(place: str, tokens_of: Callable[[str, Any], list[int]], text: str, tokenizer: Any) -> list[int]:
    """What `tokens_of` makes of a row's text; its errors name the place."""
    try:
        return tokens_of(text, tokenizer)
    except DataError as err:
        raise DataError(f"{place}: {err}") from err


def _conversation(row: dict[str, Any], key: str, place: str, tokenizer: Any, render: Callable[..., Any]) -> Any:
    """What `render` makes of a row's messages; all errors name the place."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f'{place}: has "{key}", but the base model\'s tokenizer has no chat template')
    try:
        options = _template_options(row)
        check_messages(tokenizer, row[key], **options)
        return render(tokenizer, row[key], **options)
    except DataError as err:
        raise DataError(f"{place}: {err}") from err
    except Exception as err:  # whatever the template, which is a program of its own, raises
        raise DataError(f"{place}: the chat template refuses its messages: {first_line(err)}") from err


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What a row hands to the template beside its messages, by the names that TRL's data sets have."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = parse_json(tools)
        except ValueError as err:
            raise DataError(f'"tools" ({tools[:40]!r}) is no valid JSON: {err}') from err
    if not isinstance(tools, list | None):
        raise DataError(f'"tools" ({shown(tools)}) must be a list of JSON schemas')
    if not isinstance(options, dict | None):
        raise DataError(f'"chat_template_kwargs" ({shown(options)}) must be an object')
    # Tables have null where a row has no value; some templates take an empty list for tools.
    given = {name: value for name, value in (options or {}).items() if value is not None}
    return {**given, **({"tools": tools} if tools else {})}


def _plain_text(path: Path) -> str:
    return read_text(path, error=DataError, most=None, encoding=_ENCODING)


def _refuse_kinds(folder: Path) -> None:
    """Raise where a folder has tables of several kinds, of which `datasets` would read one and leave the others out.

    Raises:
        DataError: it has, and no README.md, which may say what is the data set.
    """
    kinds = {ending for ending in (".jsonl", ".parquet", *TABLES) if next(folder.rglob(f"*{ending}"), None)}
    if len(kinds) > 1 and not os.path.lexists(folder / "README.md"):
        raise DataError(
            f"data ({folder}) is a folder with {' and '.join(sorted(kinds))} files, of which one kind would be read: "
            "give the files"
        )


def _data_set_rows(kind: str, source: str, **options: Any) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if os.path.isdir(source):
        _refuse_kinds(Path(source))
    try:
        rows = datasets.load_dataset(kind, split="train", **options)
    except Exception as err:  # the library raises many kinds, its own and those of its readers
        # Which says that there was an error.
        cause = err.__cause__ if isinstance(err, DatasetGenerationError) else None
        reason = first_line(cause or err)
        if os.path.isdir(source):
            raise DataError(
                f"data ({source}) is a folder in which no data set can be read ({reason}): give its files "
                f"({EXPECTED}), or a folder with nothing but files of one of these kinds"
            ) from err
        raise DataError(f"data ({source}) cannot be read as a data set: {reason}") from err
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows))

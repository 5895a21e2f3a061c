"""Reads rows from files, and tokenises their texts and conversations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from weft.data.chat_template import assistant_mask, check_messages, conversation_tokens, refuse_half_characters
from weft.data.tables import table_rows
from weft.errors import DataError, bullet_list, first_line
from weft.files.names import split_name
from weft.files.presence import EXPECTED, LINES, TABLES, source_problem
from weft.files.reading import parse_json, read_text, shown

Given = TypeVar("Given")
Found = TypeVar("Found")

# Windows editors write a byte order mark first.
_ENCODING = "utf-8-sig"
# The label of a token that is ignored in the loss, as in transformers.
NO_LABEL = -100


def read_tokens(source: str, tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text or conversation of one source.

    Args:
        source: a .jsonl file with "text" or "messages" in each line, a .json file of the same or with a list of such
            objects, a .parquet file with such a column, a .csv or .tsv file with a column "text", any other file as one
            plain text, or the name or folder of a data set of the `datasets` library (its split "train").
        tokenizer: the base model's tokenizer.

    Raises:
        DataError: it does not exist, it cannot be read (with the line and the reason), or it has no text.
    """
    found = [row_tokens(row, place, tokenizer) for place, row in read_rows(source)]
    found = [tokens for tokens in found if tokens]
    if not found:
        raise DataError(f"data ({source}) holds no text")
    return found


def read_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) for all rows of one source, unchanged. The place is for messages.

    Args:
        source: as for `read_tokens`; a plain text is one row, {"text": ...}.

    Raises:
        DataError: it does not exist, or it cannot be read (with the line and the reason).
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


def read_each(sources: Iterable[Given], read: Callable[[Given], Found]) -> list[Found]:
    """Call `read` with each source, and raise once for all that cannot be read.

    Raises:
        DataError: with the problems of all.
    """
    found, errors = [], []
    for source in sources:
        try:
            found.append(read(source))
        except DataError as err:
            errors.append(err)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise DataError(f"data cannot be read:{bullet_list(map(str, errors))}")
    return found


def check_length(length: int, model_config: Any) -> None:
    """Raise if the model cannot read sequences of this length.

    Raises:
        DataError: `length` is above the model's number of positions.
    """
    most = num_positions(model_config)
    if most is not None and length > most:
        raise DataError(f"sequence_length ({length}) must be at most the model's number of positions ({most})")


def num_positions(model_config: Any) -> int | None:
    """The maximum number of tokens of a model; None if its config has no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def named_sources(values: list[str]) -> dict[str, str]:
    """Convert ["math=a.jsonl", "b.jsonl"] to {name: source}; a source without a name gets the name of its file.

    Raises:
        DataError: two sources have the same name, or a name or file is empty.
    """
    sources: dict[str, str] = {}
    for value in values:
        name, source = split_name(value)
        if name is None or "/" in name:  # the "=" is part of a path
            name, source = Path(value).stem, value
        if not name or not source:
            raise DataError(f"data ({value}) must be name=FILE or FILE")
        if name in sources:
            raise DataError(f"data names {name!r} twice ({sources[name]} and {source}): give each a name, name=FILE")
        sources[name] = source
    return sources


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of the lines; for a .json file with a list, its items."""
    text = _plain_text(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = parse_json(text)
        except ValueError as err:
            raise DataError(f"{path}: no valid JSON ({err}); expected one object per line, or a list of them") from err
        yield from ((f"{path}, item {number}", row) for number, row in enumerate(items))
        return
    # Split at line feeds only: JSON strings may contain other characters at which str.splitlines splits.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = parse_json(line)
            except ValueError as err:
                raise DataError(f"{place}: no valid JSON ({err}); expected one object per line") from err
            yield place, row


def _one_text(path: Path) -> str:
    """Read a plain text file.

    Raises:
        DataError: it is binary, or has the lines of a .jsonl file.
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
    """Return the token ids of a text, with the special tokens that the tokenizer adds.

    Raises:
        DataError: the text has a lone surrogate.
    """
    refuse_half_characters(text)
    return list(tokenizer(text, verbose=False)["input_ids"])


def prompt_tokens(text: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a text to continue, without special tokens at its end.

    Raises:
        DataError: the text has a lone surrogate.
    """
    refuse_half_characters(text)
    encoded = tokenizer(text, verbose=False, return_special_tokens_mask=True)
    tokens, added = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while 0 in added and added[-1]:
        added.pop()
    return tokens[: len(added)]


def row_tokens(row: Any, place: str, tokenizer: Any) -> list[int]:
    """Return the token ids of one row; empty if its text is blank.

    Args:
        row: a dict with "text", or with "messages", which the tokenizer's chat template renders; "tools" (a list, or
            JSON) and "chat_template_kwargs" (a dict) are passed to the template.
        place: place of the row, for messages.
        tokenizer: the base model's tokenizer.

    Raises:
        DataError: it has neither, or the template cannot render it.
    """
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return at_place(place, text_tokens, row["text"], tokenizer) if row["text"].strip() else []
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return _conversation(row, "messages", place, tokenizer, conversation_tokens)
    found = f"a {type(row).__name__}"
    if isinstance(row, dict):
        wrong = next((key for key in ("text", "messages") if row.get(key) is not None), None)
        found = f'"{wrong}" as a {type(row[wrong]).__name__}' if wrong else f"the keys {shown(sorted(row))}"
    raise DataError(f'{place}: found {found}, expected an object with "text" (a string) or "messages" (a list)')


def row_prompt_tokens(row: dict[str, Any], place: str, tokenizer: Any) -> list[int]:
    """Return the token ids of a row's "prompt": a text to continue, or messages to answer.

    Raises:
        DataError: the chat template cannot render the messages, or the last one is an answer.
    """
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return at_place(place, prompt_tokens, prompt, tokenizer)
    tokens = _conversation(row, "prompt", place, tokenizer, partial(conversation_tokens, add_generation_prompt=True))
    if prompt[-1]["role"] == "assistant":
        raise DataError(f"{place}: the prompt ends with a turn of the assistant, expected one to be answered")
    return tokens


def assistant_labels(tokens: list[int], row: dict[str, Any], place: str, tokenizer: Any) -> list[int]:
    """Return the labels of a row: its token ids in the assistant's turns, -100 elsewhere.

    Args:
        tokens: result of `row_tokens`.
        row: the row of the data file.
        place: place of the row, for messages.
        tokenizer: the base model's tokenizer.

    Raises:
        DataError: the row has no "messages", or the assistant's tokens cannot be found, or there are none.
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
    """Call `tokens_of` with a row's text; errors get the place."""
    try:
        return tokens_of(text, tokenizer)
    except DataError as err:
        raise DataError(f"{place}: {err}") from err


def _conversation(row: dict[str, Any], key: str, place: str, tokenizer: Any, render: Callable[..., Any]) -> Any:
    """Call `render` with a row's messages; errors get the place."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise DataError(f'{place}: has "{key}", but the base model\'s tokenizer has no chat template')
    try:
        options = _template_options(row)
        check_messages(tokenizer, row[key], **options)
        return render(tokenizer, row[key], **options)
    except DataError as err:
        raise DataError(f"{place}: {err}") from err
    except Exception as err:  # a template is a program and can raise any error
        raise DataError(f"{place}: the chat template refuses its messages: {first_line(err)}") from err


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    """The variables of a row for the template, beside its messages; the keys are those of TRL's data sets."""
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
    # Tables have null for a missing value; some templates treat an empty list as tools.
    given = {name: value for name, value in (options or {}).items() if value is not None}
    return {**given, **({"tools": tools} if tools else {})}


def _plain_text(path: Path) -> str:
    return read_text(path, error=DataError, most=None, encoding=_ENCODING)


def _refuse_mixed_kinds(folder: Path) -> None:
    """Raise if a folder has data files of several kinds, as `datasets` would read only one kind.

    Raises:
        DataError: it has, and there is no README.md, which can name the files of the data set.
    """
    kinds = {ending for ending in (".jsonl", ".parquet", *TABLES) if next(folder.rglob(f"*{ending}"), None)}
    if len(kinds) > 1 and not os.path.lexists(folder / "README.md"):
        raise DataError(
            f"data ({folder}) is a folder with {' and '.join(sorted(kinds))} files, but only one kind would be read: "
            "give the files"
        )


def _full_name(name: str) -> str:
    """The name of a data set on the Hub with its user's name.

    If the Hub has none of this name, `datasets` would take a folder of the same name that it has read anywhere before.
    """
    from huggingface_hub import HfApi

    return name if "/" in name else str(HfApi().dataset_info(name).id)


def _data_set_rows(kind: str, source: str, **options: Any) -> Iterator[tuple[str, Any]]:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if os.path.isdir(source):
        _refuse_mixed_kinds(Path(source))
    try:
        kind = _full_name(kind) if kind == source and not os.path.isdir(source) else kind
        rows = datasets.load_dataset(kind, split="train", **options)
    except Exception as err:  # the library and its readers raise many kinds of errors
        # A DatasetGenerationError says only that there was an error.
        cause = err.__cause__ if isinstance(err, DatasetGenerationError) else None
        reason = first_line(cause or err)
        if os.path.isdir(source):
            raise DataError(
                f"data ({source}) is a folder in which no data set can be read ({reason}): give its files "
                f"({EXPECTED}), or a folder with nothing but files of one of these kinds"
            ) from err
        raise DataError(f"data ({source}) cannot be read as a data set: {reason}") from err
    yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows))

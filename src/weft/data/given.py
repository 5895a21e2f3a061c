"""Converts the texts, rows or token ids that functions accept in Python to token ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.data.texts import at_place, prompt_tokens, row_prompt_tokens, row_tokens, text_tokens
from weft.errors import ConfigError
from weft.files.reading import shown

Given = str | Tensor | Sequence[int] | Mapping[str, Any]
_EXPECTED = (
    "token ids ([5, 6, 7], torch.int64 of shape [seq] or [1, seq], or a row {'input_ids': [5, 6, 7]}), or, with "
    "tokenizer=, a text ('The contract says') or a row of one ({'text': 'The contract says'} or {'messages': [...]})"
)


def given_tokens(
    given: Any, what: str, tokenizer: Any = None, *, is_prompt: bool = False, vocabulary: int | None = None
) -> list[int]:
    """Return the token ids of a text, of a row of a data file, or of token ids in another form.

    Args:
        given: a text, or a row with "text" or "messages", which need a tokenizer; or token ids ([seq] or [1, seq]), or
            a row with `input_ids`.
        what: its name in messages.
        tokenizer: the base model's tokenizer.
        is_prompt: whether the text will be continued, or the messages answered.
        vocabulary: the number of token ids that the model can read; None does not check them.

    Raises:
        ConfigError: `given` has another type, it is a text and there is no tokenizer, or a token id is not in the
            vocabulary.
        DataError: the text or the messages cannot be tokenised.
    """
    check_tokenizer(tokenizer)
    tokens = _tokens_of(given, what, tokenizer, is_prompt=is_prompt)
    check_vocabulary(tokens, what, vocabulary)
    return tokens


def _tokens_of(given: Any, what: str, tokenizer: Any, *, is_prompt: bool) -> list[int]:
    if isinstance(given, Mapping) and "input_ids" in given:
        return _token_ids(given["input_ids"], what)
    if not is_text(given):
        return _token_ids(given, what)
    if tokenizer is None:
        raise ConfigError(f"tokenizer (None) must be given with a text ({shown(given)})")
    if isinstance(given, str):
        return at_place(what, prompt_tokens if is_prompt else text_tokens, given, tokenizer)
    if is_prompt:
        return row_prompt_tokens({**given, "prompt": given.get("text", given.get("messages"))}, what, tokenizer)
    return row_tokens(dict(given), what, tokenizer)


def some_tokens(
    given: Any, what: str, tokenizer: Any = None, *, is_prompt: bool = False, vocabulary: int | None = None
) -> list[int]:
    """`given_tokens`, but raise if there are no tokens.

    Raises:
        ConfigError, DataError: as `given_tokens`; or there are no tokens.
    """
    tokens = given_tokens(given, what, tokenizer, is_prompt=is_prompt, vocabulary=vocabulary)
    if not tokens:
        raise ConfigError(f"{what} ({shown(given)}) has no tokens, expected at least one")
    return tokens


def check_tokenizer(tokenizer: Any) -> None:
    """Raise if this is no tokenizer; None is none, but accepted.

    Raises:
        ConfigError: it is another object, for example a tokenizer's name.
    """
    if tokenizer is None or (callable(tokenizer) and hasattr(tokenizer, "decode")):
        return
    name = os.fspath(tokenizer) if isinstance(tokenizer, str | os.PathLike) else None
    found = type(tokenizer).__name__ if name is None else shown(name)
    source = "..." if name is None else shown(name)
    raise ConfigError(f"tokenizer ({found}) must be a tokenizer, e.g. AutoTokenizer.from_pretrained({source})")


def check_vocabulary(tokens: Sequence[int], what: str, vocabulary: int | None) -> None:
    """Raise if a token id is not in the model's vocabulary of this size; None does not check.

    Raises:
        ConfigError: there is such a token id.
    """
    if vocabulary is None or not tokens:
        return
    for token in (max(tokens), min(tokens)):
        if not 0 <= token < vocabulary:
            raise ConfigError(
                f"{what} (token id {token}) must have ids of the model's vocabulary of {vocabulary} tokens, 0 to "
                f"{vocabulary - 1}: take the tokenizer of its base model"
            )


def several_problem(given: Any, what: str) -> str | None:
    """Why this is not several texts or rows; None if it is a list, a data set or another iterable of them."""
    one = isinstance(given, str | bytes | Mapping) or getattr(given, "shape", None) == ()
    if not one and (isinstance(given, Iterable) or hasattr(given, "__getitem__")):
        return None
    kind = "None" if given is None else type(given).__name__
    return f"{what} ({kind}) must be a list of texts or rows: [...]"


def several(given: Any, what: str) -> Any:
    """Several texts or rows, with a length and by their number: a list or data set itself, else a list of them.

    Raises:
        ConfigError: it is something else, for example one text.
    """
    problem = several_problem(given, what)
    if problem is not None:
        raise ConfigError(problem)
    return given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)


def is_text(given: Any) -> bool:
    """Whether this is a text, or a row with "text" or "messages"."""
    if isinstance(given, Mapping):
        return isinstance(given.get("text"), str) or isinstance(given.get("messages"), list)
    return isinstance(given, str)


def _token_ids(given: Any, what: str) -> list[int]:
    kind = f"the keys {shown(sorted(given))}" if isinstance(given, Mapping) else type(given).__name__
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        ids = None
    if ids is not None:
        kind = f"{ids.dtype} of shape {list(ids.shape)}" if ids.dim() else f"{shown(given)}, a single value"
        if ids.numel() == 0 and ids.dim() == 1:
            return []
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if whole and (ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1)):
            return ids.flatten().tolist()
    raise ConfigError(f"{what} ({kind}) must be {_EXPECTED}")

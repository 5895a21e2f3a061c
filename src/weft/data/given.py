"""Converts the texts, rows or token ids that functions accept in Python to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def given_tokens(given: Any, what: str, tokenizer: Any = None, *, is_prompt: bool = False) -> list[int]:
    """Return the token ids of a text, of a row of a data file, or of token ids in another form.

    Args:
        given: a text, or a row with "text" or "messages", which need a tokenizer; or token ids ([seq] or [1, seq]), or
            a row with `input_ids`.
        what: its name in messages.
        tokenizer: the base model's tokenizer.
        is_prompt: whether the text will be continued, or the messages answered.

    Raises:
        ConfigError: `given` has another type, or it is a text and there is no tokenizer.
        DataError: the text or the messages cannot be tokenised.
    """
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


def some_tokens(given: Any, what: str, tokenizer: Any = None, *, is_prompt: bool = False) -> list[int]:
    """`given_tokens`, but raise if there are no tokens.

    Raises:
        ConfigError, DataError: as `given_tokens`; or there are no tokens.
    """
    tokens = given_tokens(given, what, tokenizer, is_prompt=is_prompt)
    if not tokens:
        raise ConfigError(f"{what} ({shown(given)}) has no tokens, expected at least one")
    return tokens


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
        kind = f"{ids.dtype} of shape {list(ids.shape)}"
        if ids.numel() == 0 and ids.dim() == 1:
            return []
        whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if whole and (ids.dim() == 1 or (ids.dim() == 2 and len(ids) == 1)):
            return ids.flatten().tolist()
    raise ConfigError(f"{what} ({kind}) must be {_EXPECTED}")

"""Cuts long texts into windows. Each begins with the tokens that the tokenizer puts before a text.

The tokenizers of Gemma, Llama and others begin a text with `<bos>`, and models can depend on it: without it, the
perplexity of Gemma 3 270M is 3 to 6 times as high (benchmarks/results/2026-11-28-domains-bos.md). So all windows of a
text get it, not only the first, as in llama.cpp's perplexity.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from weft.errors import DataError

Value = TypeVar("Value")

# Texts of one character, of which a vocabulary has one: words, protein or bases, numbers.
_PROBES = ("a", "A", "0")


def opening_of(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before a text, for example `[<bos>]`; [] for None.

    Found by comparing a text with and without special tokens, as no attribute says it for all tokenizers: that of
    SmolLM2 has a `bos_token` that it does not add.
    """
    for text in _PROBES if tokenizer is not None else ():
        try:
            whole = list(tokenizer(text)["input_ids"])
            plain = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # vocabularies without this letter, and without an unknown token
            continue
        found = [at for at in range(len(whole) - len(plain) + 1) if whole[at : at + len(plain)] == plain]
        if plain and len(found) == 1:  # several, if the unknown token is one of those that are added
            return whole[: found[0]]
    return []


def opening_length(tokens: Sequence[int], opening: Sequence[int]) -> int:
    """The number of tokens with which each window of this text begins: none if the text does not begin with them.

    A conversation begins with what its template says.
    """
    return len(opening) if list(tokens[: len(opening)]) == list(opening) else 0


def spans(num_tokens: int, length: int, opening: int = 0, *, least: int = 2) -> Iterator[tuple[int, int]]:
    """The (start, end) of consecutive windows of at most `length` tokens.

    Args:
        num_tokens: number of tokens of the text.
        length: of a window, with the opening.
        opening: number of tokens at the text's start that are put before each later window. They are not in its span.
        least: tokens of a window, with the opening; with two, there is one to predict.

    Raises:
        DataError: `length` leaves no token to predict.

    Example:
        >>> list(spans(10, 4)), list(spans(10, 4, opening=1))
        ([(0, 4), (4, 8), (8, 10)], [(0, 4), (4, 7), (7, 10)])
    """
    check_sequence_length(length, opening)
    start, end = 0, min(length, num_tokens)
    while end > start and end - start + (opening if start else 0) >= least:
        yield start, end
        start, end = end, min(end + length - opening, num_tokens)


def window(values: Sequence[Value], start: int, end: int, opening: int = 0) -> list[Value]:
    """The values of a window: those of the opening, then those from `start` to `end`."""
    return [*values[: opening if start else 0], *values[start:end]]


def end_of(tokens: Sequence[int], length: int, opening: Sequence[int]) -> tuple[list[int], int, int]:
    """The last window of a text, of at most `length` tokens.

    Returns:
        Its tokens; the number of those of its opening; and the number by which the others' indices get smaller.
    """
    before = opening_length(tokens, opening)
    check_sequence_length(length, before)
    cut = max(0, len(tokens) - length)
    return window(tokens, cut + before if cut else 0, len(tokens), before), before, cut


def token_sequences(texts: Iterable[list[int]], length: int, opening: Sequence[int] = ()) -> list[list[int]]:
    """Split the tokens of each text into consecutive sequences of at most `length`; a remainder of one is dropped.

    Args:
        texts: the token ids of each text.
        length: maximum number of tokens in a sequence.
        opening: see `opening_of`; each sequence of a text that begins with these tokens begins with them.

    Raises:
        DataError: `length` leaves no token to predict, or no text has two tokens.
    """
    check_sequence_length(length)
    sequences = []
    for tokens in texts:
        before = opening_length(tokens, opening)
        sequences += [window(tokens, start, end, before) for start, end in spans(len(tokens), length, before)]
    if not sequences:
        raise DataError("the data holds no text of two tokens or more")
    return sequences


def check_sequence_length(length: int, opening: int = 0) -> None:
    """Raise if sequences of this length have no token to predict.

    Raises:
        DataError: `length` is below 2, or not above the number of tokens with which each window begins.
    """
    if length < 2:
        raise DataError(f"sequence_length ({length}) must be at least 2: one token to read, one to predict")
    if length <= opening:
        raise DataError(
            f"sequence_length ({length}) must be at least {opening + 1}: the tokenizer begins each text with {opening} "
            "tokens"
        )

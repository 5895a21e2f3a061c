"""Drafts of the coming tokens, so that one call of the model can check several.

Two sources. The text's own n-grams cost nothing: what followed the last tokens the last time they occurred may follow
again, as it does where code is edited or a text is quoted. The scaling pass costs a pass per drafted token, but one
whose result is needed anyway if the token is right: it is the base model reading the text, and with the LM head it says
what the base model would write.

A drafted token is kept where it is the token that would have been chosen without it (see `stream.py`), so drafts change
the time alone. When they miss, they get shorter, and pause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Lengths of the endings that are looked up, the longest first.
NGRAM_LENGTHS = (4, 3, 2)
# A source that has missed again and again is tried again after so many tokens, at most.
LONGEST_PAUSE = 64


class NGramDrafts:
    """The text goes on as it did after the latest earlier occurrence of its last tokens.

    Args:
        tokens: of the text so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        # n-gram -> the index after its latest occurrence, of those that something follows.
        self._indices: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Tokens that follow the text."""
        for token in tokens:
            index = len(self.tokens)
            for length in NGRAM_LENGTHS:
                if index >= length:
                    self._indices[tuple(self.tokens[index - length :])] = index
            self.tokens.append(token)

    def __call__(self, limit: int) -> list[int]:
        """At most so many tokens; none where the text's end is new."""
        for length in NGRAM_LENGTHS:
            index = self._indices.get(tuple(self.tokens[-length:]))
            if index is not None and len(self.tokens) >= length:
                return self.tokens[index : index + limit]
        return []


class DraftLength:
    """How many tokens a source may draft: more while they are right, fewer when they are not, then none for a while.

    Args:
        largest: never more.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._length = min(2, largest)
        self._misses = 0
        self._pause = 0

    def now(self) -> int:
        """For the coming call."""
        if self._pause > 0:
            self._pause -= 1
            return 0
        return self._length

    def note(self, right: int, drafted: int) -> None:
        """How many of the drafted tokens were right."""
        if right == drafted:
            self._length = min(self.largest, 2 * self._length)
        elif right == 0:
            self._length = max(1, self._length // 2)
        else:
            self._length = max(1, min(self._length, right + 1))
        self._misses = 0 if right > 0 else self._misses + 1
        self._pause = min(LONGEST_PAUSE, 2**self._misses - 1)


class DraftTimer:
    """Whether drafting with the scaling pass is faster than not to draft, by the clock.

    After a few plain tokens it is tried, and again now and then: the text may have become easier.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}  # drafting or not -> per token
        self._until_next_try = 4

    def draft_now(self) -> bool:
        """For the coming call."""
        if False not in self._seconds:
            return False
        if self._until_next_try > 0:
            self._until_next_try -= 1
            return self._seconds.get(True, float("inf")) < 0.95 * self._seconds[False]
        self._until_next_try = LONGEST_PAUSE
        return True

    def note(self, drafting: bool, seconds: float, tokens: int) -> None:
        """What a call took, and how many tokens it brought."""
        before = self._seconds.get(drafting)
        now = seconds / tokens
        self._seconds[drafting] = now if before is None else 0.8 * before + 0.2 * now


class Speculation:
    """Drafts for one text, from both sources.

    Args:
        tuner: the X-LoRA model.
        cache: the double cache that the text is read into.
        tokens: of the prompt.
        largest: at most so many drafted tokens per call.
        with_base: also draft with the scaling pass, where there is a whole one.
    """

    def __init__(self, tuner: Any, cache: Any, tokens: Sequence[int], largest: int, *, with_base: bool = True) -> None:
        self.tuner = tuner
        self.cache = cache
        self.ngrams = NGramDrafts(tokens)
        self._ngram_length = DraftLength(largest)
        self._base_length = DraftLength(min(largest, 3))
        self._timer = DraftTimer()
        config = tuner.xlora_config
        self._with_base = with_base and not config.reads_inside and tuner.passes.gate_decides
        self._source: DraftLength | None = None
        self._started = 0.0

    def __call__(self, unread: Tensor, limit: int) -> tuple[list[int], Float[Tensor, "1 seq hidden"] | None]:
        """A draft of the tokens after `unread`, and what the scaling pass read on the way, if the draft is its own.

        Args:
            unread: `[1, seq]`, the tokens at the end of the text that the cache lacks.
            limit: at most so many.
        """
        self._started = time.perf_counter()
        self._source, drafted = self._ngram_length, self.ngrams(min(limit, self._ngram_length.now()))
        if drafted or unread.shape[1] > 1:
            return drafted, None
        self._source = None
        if limit < 1 or not (self._with_base and self._timer.draft_now()):
            return [], None
        self._source = self._base_length
        return self._by_base(unread, min(limit, max(1, self._base_length.now())))

    def note(self, right: int, drafted: int, tokens: Sequence[int]) -> None:
        """What became of the draft, and the tokens that the call brought."""
        self.ngrams.extend(tokens)
        if self._source is not self._ngram_length:
            self._timer.note(self._source is not None, time.perf_counter() - self._started, len(tokens))
        if self._source is not None and drafted:
            self._source.note(right, drafted)

    def _by_base(self, token: Tensor, number: int) -> tuple[list[int], Tensor]:
        passes, head = self.tuner.passes, self.tuner.backbone.base.get_output_embeddings()
        hidden, drafted = [], []
        for _ in range(number):
            hidden.append(passes.scaling_step(token, self.cache))
            with passes.as_scaling_pass():
                token = head(hidden[-1]).argmax(-1)  # [1, 1]
            drafted.append(int(token))
        # The last token is read too: where all are right, the call brings one token more.
        hidden.append(passes.scaling_step(token, self.cache))
        return drafted, torch.cat(hidden, 1)

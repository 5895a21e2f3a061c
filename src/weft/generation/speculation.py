"""Drafts of the next tokens for speculative decoding: one call of the model checks several of them.

There are two sources. The n-grams of the text cost nothing: the tokens that followed the last earlier occurrence of the
text's last tokens may follow again, for example in edited code or quotations. The scaling pass needs one pass for each
drafted token; but it is a pass of the base model, whose result is needed anyway if the token is accepted. With the LM
head it gives the base model's next token.

A drafted token is accepted if it is the token that would be chosen without the draft (see `stream.py`), so drafts only
change the speed. After rejected drafts, the drafts become shorter, and then pause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Lengths of the n-grams, the longest first.
NGRAM_LENGTHS = (4, 3, 2)
# Maximum number of calls without drafts after repeated rejections.
LONGEST_PAUSE = 64


class NGramDrafts:
    """Drafts the tokens that followed the latest earlier occurrence of the text's last tokens.

    Args:
        tokens: the tokens of the text so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        # n-gram -> the index after its latest occurrence that is followed by a token.
        self._indices: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the text."""
        for token in tokens:
            index = len(self.tokens)
            for length in NGRAM_LENGTHS:
                if index >= length:
                    self._indices[tuple(self.tokens[index - length :])] = index
            self.tokens.append(token)

    def __call__(self, limit: int) -> list[int]:
        """Draft at most `limit` tokens; none if the last tokens have not occurred before."""
        for length in NGRAM_LENGTHS:
            index = self._indices.get(tuple(self.tokens[-length:]))
            if index is not None and len(self.tokens) >= length:
                return self.tokens[index : index + limit]
        return []


class DraftLength:
    """The number of tokens that a source drafts: it grows with accepted drafts, and shrinks and pauses without.

    Args:
        largest: the maximum.
    """

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self._length = min(2, largest)
        self._misses = 0
        self._pause = 0

    def now(self) -> int:
        """The number for the next call."""
        if self._pause > 0:
            self._pause -= 1
            return 0
        return self._length

    def note(self, right: int, drafted: int) -> None:
        """Record how many of the drafted tokens were accepted."""
        if right == drafted:
            self._length = min(self.largest, 2 * self._length)
        elif right == 0:
            self._length = max(1, self._length // 2)
        else:
            self._length = max(1, min(self._length, right + 1))
        self._misses = 0 if right > 0 else self._misses + 1
        self._pause = min(LONGEST_PAUSE, 2**self._misses - 1)


class DraftTimer:
    """Measures whether drafting with the scaling pass is faster than no drafts.

    It is tried after a few tokens, and again at intervals, as the text may have become easier to predict.
    """

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}  # drafting or not -> seconds per token
        self._until_next_try = 4

    def draft_now(self) -> bool:
        """Whether to draft in the next call."""
        if False not in self._seconds:
            return False
        if self._until_next_try > 0:
            self._until_next_try -= 1
            return self._seconds.get(True, float("inf")) < 0.95 * self._seconds[False]
        self._until_next_try = LONGEST_PAUSE
        return True

    def note(self, drafting: bool, seconds: float, tokens: int) -> None:
        """Record the time of a call and the number of new tokens."""
        before = self._seconds.get(drafting)
        now = seconds / tokens
        self._seconds[drafting] = now if before is None else 0.8 * before + 0.2 * now


class Speculation:
    """Drafts for one text, from both sources.

    Args:
        tuner: the X-LoRA model.
        cache: the KV cache of both passes.
        tokens: the tokens of the prompt.
        largest: maximum number of drafted tokens in a call.
        with_base: also draft with the scaling pass, if it runs all layers.
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
        """Draft the tokens after `unread`; returns also the result of the scaling pass if it made the draft.

        Args:
            unread: `[1, seq]`, the last tokens of the text, which are not in the cache.
            limit: maximum number of drafted tokens.
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
        """Record how many drafted tokens were accepted, and the new tokens of the call."""
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
        # The last drafted token is read too: if all are accepted, the call gives one more token.
        hidden.append(passes.scaling_step(token, self.cache))
        return drafted, torch.cat(hidden, 1)

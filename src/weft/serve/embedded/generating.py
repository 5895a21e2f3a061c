"""One text of a request, token by token, with what is told of each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from weft.detokeniser import Detokeniser
from weft.placement import execution_device
from weft.sampling import Sampler
from weft.serve.embedded.bodies import Prompt, Wanted
from weft.serve.embedded.metrics import Metrics
from weft.serve.embedded.stops import StopStrings
from weft.serve.requests import FIELD, RequestError
from weft.streaming import Reader, tuner_of

_ROWS = 64  # of logits, whose log-probabilities are in memory at a time


@dataclass(frozen=True)
class Told:
    """What is told of one token.

    Attributes:
        token: its id.
        offset: where its text begins in the choice's.
        logprob: of the model, before temperature and penalties; None where none was asked for, and at a text's first
            token, which nothing predicts.
        alternatives: the likeliest tokens with theirs, likeliest first.
        shares: expert name -> its share, where they were asked for.
    """

    token: int
    offset: int = 0
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Piece:
    """What one choice has more.

    Attributes:
        index: of the choice.
        text: to be added.
        prompt: the tokens that the text begins with, where the prompt is part of the answer.
        tokens: the new tokens.
        finish_reason: None while there is more to come.
    """

    index: int
    text: str
    tokens: tuple[Told, ...] = ()
    prompt: tuple[Told, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None


def pieces(model: Any, tokenizer: Any, wanted: Wanted, index: int, metrics: Metrics) -> Iterator[Piece]:
    """The pieces of one choice; the tokens are those of `model.generate`.

    Args:
        model: a mixture, which follows what was chosen.
        tokenizer: the base model's.
        wanted: the request.
        index: of the choice: those of the first prompt come first.
        metrics: count tokens and shares.

    Raises:
        RequestError: the numbers in the request leave nothing to choose from.
    """
    prompt, sample = wanted.prompts[index // wanted.n], index % wanted.n
    text = Writing(model, tokenizer, wanted, prompt, sample, metrics)
    waiting: list[Told] = []  # told when text comes: what may become a stop string is held back
    if wanted.echo:
        echoed, scores = text.echo()
        ended = prompt.max_tokens == 0
        yield Piece(index, echoed, prompt=scores, finish_reason="length" if ended else None)
        if ended:
            return
    finish_reason: Literal["stop", "length"] | None = None
    while finish_reason is None:
        told, new, finish_reason = text.step()
        waiting.append(told)
        if new or finish_reason is not None:
            yield Piece(index, new, tuple(waiting), finish_reason=finish_reason)
            waiting = []


class Writing:
    """A text that is being written.

    Args:
        model, tokenizer, wanted, metrics: as for `pieces`.
        prompt: what it goes on from.
        sample: number of the choice among those of the prompt, which moves the seed.
    """

    def __init__(
        self, model: Any, tokenizer: Any, wanted: Wanted, prompt: Prompt, sample: int, metrics: Metrics
    ) -> None:
        self.tuner = tuner_of(model)
        self.wanted, self.prompt, self.metrics = wanted, prompt, metrics
        self._tokenizer = tokenizer
        self._reader = Reader(model, self.tuner.backbone.empty_cache())
        self._ids = torch.tensor([prompt.tokens], device=execution_device(self.tuner.backbone.base))
        penalty = wanted.repetition_penalty
        if penalty is None:
            penalty = self.tuner.backbone.base.generation_config.repetition_penalty or 1.0
        self._sampler = Sampler(
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            repetition_penalty=penalty,
            seed=None if wanted.seed is None else (wanted.seed + sample) % 2**63,
        )
        self._detokeniser = Detokeniser(tokenizer, prompt.tokens)
        self._stops = StopStrings(wanted.stop)
        self._ahead: Tensor | None = None
        self._length = len(prompt.text) if wanted.echo else 0
        self._number = 0

    def echo(self) -> tuple[str, tuple[Told, ...]]:
        """The prompt's text, and what is told of its tokens."""
        if self.wanted.logprobs is None:
            return self.prompt.text, tuple(Told(token) for token in self.prompt.tokens)
        logits = self._read(every_place=True)
        self._ahead = logits[-1:]
        scores = [(None, ()), *self._scores(logits[:-1], list(self.prompt.tokens[1:]))]
        detokeniser, offsets, length = Detokeniser(self._tokenizer), [], 0
        for token in self.prompt.tokens:
            offsets.append(length)
            length += len(detokeniser.add(token))
        told = [
            Told(token, offset, logprob, alternatives)
            for token, offset, (logprob, alternatives) in zip(self.prompt.tokens, offsets, scores, strict=True)
        ]
        return self.prompt.text, tuple(told)

    def step(self) -> tuple[Told, str, Literal["stop", "length"] | None]:
        """The next token, the text that can be let out with it, and why the text ends there, if it does."""
        logits = self._read() if self._ahead is None else self._ahead
        self._ahead = None
        chosen = self._choose(logits)
        self._ids = torch.cat([self._ids, chosen[None]], dim=1)
        token, self._number = int(chosen), self._number + 1
        self.metrics.generated()
        shares = self._shares() if self.wanted.choice.shares else None
        score: tuple[float | None, tuple[tuple[int, float], ...]] = (None, ())
        if self.wanted.logprobs is not None:
            score = self._scores(logits, [token])[0]
        told = Told(token, self._length, *score, shares)
        ended = token in self.wanted.ends
        last = ended or self._number == self.prompt.max_tokens
        text = "" if ended else self._detokeniser.add(token)
        text += self._detokeniser.flush() if last else ""
        self._length += len(text)
        let_out = self._stops.add(text)
        if self._stops.found:
            return told, let_out, "stop"
        if not last:
            return told, let_out, None
        return told, let_out + self._stops.flush(), "stop" if ended else "length"

    def _read(self, *, every_place: bool = False) -> Float[Tensor, "place vocab"]:
        logits, _ = self._reader.read(self._ids, every_place=every_place)
        passes = self.tuner.passes
        if passes.gate_decides and (followed := passes.followed()) is not None:
            self.metrics.decided(followed[0].mean(1))
        # Of the last place: a number that is none spreads from wherever it arose.
        if torch.isnan(logits[0, -1]).any():
            chosen = self.wanted.choice.decides
            what = f"weft ({self.wanted.choice.written()})" if chosen else f"model ({self.wanted.model})"
            raise RequestError(
                f"the logits are not numbers (NaN) with {what}: its weights are broken or too large",
                FIELD if chosen else "model",
                status=400 if chosen else 500,
            )
        return logits[0]

    def _choose(self, logits: Tensor) -> Tensor:
        try:
            return self._sampler(self._ids, logits)
        except RuntimeError as err:
            raise RequestError(
                f"temperature ({self.wanted.temperature:g}) and repetition_penalty ({self.wanted.repetition_penalty}) "
                f"leave no probabilities to sample from: {err}",
                "temperature",
            ) from err

    def _scores(self, logits: Tensor, tokens: list[int]) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
        """Log-probability of each token, with those of the likeliest ones."""
        number, found = self.wanted.logprobs or 0, []
        for start in range(0, len(tokens), _ROWS):
            rows = logits[start : start + _ROWS].float().log_softmax(-1)
            best, ids = rows.topk(min(number, rows.shape[-1]))
            for row, token, values, names in zip(
                rows, tokens[start : start + _ROWS], best.tolist(), ids.tolist(), strict=True
            ):
                found.append((float(row[token]), tuple(zip(names, values, strict=True))))
        return found

    def _shares(self) -> dict[str, float]:
        return self._reader.shares(0) or dict.fromkeys(self.tuner.xlora_config.expert_names or (), 0.0)

"""One text of a request, token by token: converts logits to pieces of the answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.errors import ConfigError
from weft.generation.detokenizer import Detokenizer
from weft.generation.sampling import Sampler
from weft.serve.embedded.bodies import Wanted
from weft.serve.embedded.stops import StopStrings
from weft.serve.requests import FIELD, RequestError

_ROWS = 64  # rows of logits that are converted to log-probabilities at a time, to limit memory
Score = tuple[float | None, tuple[tuple[int, float], ...]]
Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenInfo:
    """The data of one token in the answer.

    Attributes:
        token: the token id.
        offset: start of its text in the text of the choice, in characters.
        logprob: log-probability of the model, before temperature and penalties; None if it is not requested, or for the
            first token of a text.
        alternatives: (token, log-probability) of the most likely tokens, in descending order.
        shares: expert name -> share, if requested; else None.
    """

    token: int
    offset: int = 0
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    shares: dict[str, float] | None = None


@dataclass(frozen=True)
class Piece:
    """The next piece of one choice.

    Attributes:
        index: index of the choice.
        text: the next text.
        tokens: the new tokens.
        prompt: the tokens of the prompt, if the answer includes it.
        finish_reason: None if more pieces follow.
    """

    index: int
    text: str
    tokens: tuple[TokenInfo, ...] = ()
    prompt: tuple[TokenInfo, ...] = ()
    finish_reason: Reason | None = None


class Writing:
    """A text that is being generated. With the model's logits, its tokens are those of `model.generate`.

    Args:
        wanted: the request.
        index: index of the choice; the choices of the first prompt are first.
        tokenizer: the base model's tokenizer.
        device: device of the logits.
        penalty: repetition penalty if the request has none.

    Attributes:
        ids: all tokens so far, [1, seq].
        finished: whether the text is complete.

    Example:
        >>> writing = Writing(wanted, 0, tokenizer, "cpu")
        >>> while not writing.finished:
        ...     pieces = list(writing.take(reader.read(writing.ids)[0][0], None))
    """

    def __init__(self, wanted: Wanted, index: int, tokenizer: Any, device: Any, penalty: float = 1.0) -> None:
        self.wanted, self.index = wanted, index
        self.prompt, sample = wanted.prompts[index // wanted.n], index % wanted.n
        self.ids: Int[Tensor, "1 seq"] = torch.tensor([self.prompt.tokens], device=device)
        self.finished = False
        self._tokenizer = tokenizer
        self._sampler = Sampler(
            temperature=wanted.temperature,
            top_k=wanted.top_k,
            top_p=wanted.top_p,
            repetition_penalty=penalty if wanted.repetition_penalty is None else wanted.repetition_penalty,
            seed=None if wanted.seed is None else (wanted.seed + sample) % 2**63,
        )
        self._detokenizer = Detokenizer(tokenizer, self.prompt.tokens)
        self._stops = StopStrings(wanted.stop)
        self._length = len(self.prompt.text) if wanted.echo else 0  # length of the text in characters
        self._number = 0  # number of new tokens
        self._waiting: list[TokenInfo] = []  # tokens whose text is held back, as it may begin a stop string

    @property
    def wants_every_place(self) -> bool:
        """Whether `take` needs the logits after each token of the prompt, for log-probabilities of the prompt."""
        return self.wanted.echo and self.wanted.logprobs is not None and self._number == 0

    def take(self, logits: Float[Tensor, "place vocab"], shares: dict[str, float] | None) -> Iterator[Piece]:
        """Choose the next token, and return the new pieces.

        Args:
            logits: the logits after the text so far, or after each of its tokens (`wants_every_place`).
            shares: the experts' shares at the last position, or None.

        Raises:
            RequestError: the logits are NaN or infinite, or the options leave no probabilities to sample from.
        """
        # The last position is enough, as NaN at earlier positions spreads to it. NaN is the largest number to `max`.
        if not logits[-1].max().isfinite():
            raise self._no_numbers()
        if self._number == 0 and self.wanted.echo:
            self.finished = self.prompt.max_tokens == 0
            reason: Reason | None = "length" if self.finished else None
            yield Piece(self.index, self.prompt.text, prompt=self._prompt_infos(logits), finish_reason=reason)
            if self.finished:
                return
        info, text, finish_reason = self._next(logits[-1:], shares)
        self.finished = finish_reason is not None
        self._waiting.append(info)
        if text or self.finished:
            tokens, self._waiting = tuple(self._waiting), []
            yield Piece(self.index, text, tokens, finish_reason=finish_reason)

    def _next(
        self, logits: Float[Tensor, "1 vocab"], shares: dict[str, float] | None
    ) -> tuple[TokenInfo, str, Reason | None]:
        """(next token, text that can be sent now, finish reason or None)."""
        chosen = self._choose(logits)
        self.ids = torch.cat([self.ids, chosen[None]], dim=1)
        token, self._number = int(chosen), self._number + 1
        score: Score = (None, ()) if self.wanted.logprobs is None else self._scores(logits, [token])[0]
        info = TokenInfo(token, self._length, *score, shares)
        ended = token in self.wanted.ends
        last = ended or self._number == self.prompt.max_tokens
        text = "" if ended else self._detokenizer.add(token)
        text += self._detokenizer.flush() if last else ""
        self._length += len(text)
        let_out = self._stops.add(text)
        if self._stops.found:
            return info, let_out, "stop"
        if not last:
            return info, let_out, None
        return info, let_out + self._stops.flush(), "stop" if ended else "length"

    def _prompt_infos(self, logits: Float[Tensor, "place vocab"]) -> tuple[TokenInfo, ...]:
        """The data of the prompt's tokens."""
        tokens = self.prompt.tokens
        if self.wanted.logprobs is None:
            return tuple(TokenInfo(token) for token in tokens)
        scores: list[Score] = [(None, ()), *self._scores(logits[:-1], list(tokens[1:]))]
        detokenizer, found, length = Detokenizer(self._tokenizer), [], 0
        for token, score in zip(tokens, scores, strict=True):
            found.append(TokenInfo(token, length, *score))
            length += len(detokenizer.add(token))
        return tuple(found)

    def _choose(self, logits: Float[Tensor, "1 vocab"]) -> Tensor:
        try:
            return self._sampler(self.ids, logits)
        except ConfigError as err:
            raise RequestError(str(err), "temperature") from err

    def _scores(self, logits: Float[Tensor, "place vocab"], tokens: list[int]) -> list[Score]:
        """The log-probability of each token, and those of the most likely tokens."""
        number = min(self.wanted.logprobs or 0, logits.shape[-1])
        found: list[Score] = []
        for start in range(0, len(tokens), _ROWS):
            rows = logits[start : start + _ROWS].float().log_softmax(-1)
            values, ids = (each.tolist() for each in rows.topk(number))
            for row, token, of_row, names in zip(rows, tokens[start : start + _ROWS], values, ids, strict=True):
                found.append((float(row[token]), tuple(zip(names, of_row, strict=True))))
        return found

    def _no_numbers(self) -> RequestError:
        chosen = self.wanted.choice.decides
        what = f"weft ({self.wanted.choice.written()})" if chosen else f"model ({self.wanted.model})"
        return RequestError(
            f"the logits are NaN or infinite with {what}: its weights are broken or too large",
            FIELD if chosen else "model",
            status=400 if chosen else 500,
        )

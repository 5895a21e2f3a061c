"""The numbers of a trace, and what follows from them: shares, entropy, perplexities. No file and no screen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import compress
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from weft.gate.losses import normalised_entropy

_Own = TypeVar("_Own", bound="TraceNumbers")
TENSORS = ("scalings", "token_ids", "log_probs", "base_log_probs")


@dataclass(frozen=True)
class TracedText:
    """One text in a trace, read without the ones before it.

    Attributes:
        name: of its data set; "" where there is none.
        num_tokens: how many of the trace's tokens it has.
        prompt_length: tokens before the generated ones; None where nothing was generated.
    """

    name: str
    num_tokens: int
    prompt_length: int | None = None


@dataclass(frozen=True, eq=False)
class TraceNumbers:
    """The scalings of texts, with the tokens and how well they were predicted.

    Token t has the scalings λ_{t,l,e} with which the model *read* it, top-k applied; the model predicted it one token
    earlier. The axis `layer` is 1 where one value holds for all layers. Padding is not in it.

    Args:
        scalings: λ, as the layers followed them.
        token_ids: of all texts, one after the other.
        log_probs: ln p(token | the text before it), under the mixture; NaN for each text's first token, and for all
            where the model predicts none.
        base_log_probs: the same under the base model, the experts off.
        pieces: the text of each token; "" where a character ends in a later one.
        expert_names: in the order of the axis `expert`.
        layer_names: in the order of the axis `layer`.
        texts: how the tokens fall into texts.
        title: what was traced, for people.
        num_left_out: tokens of the texts that the limit kept out of the trace.

    Example:
        >>> numbers.shares()[0]  # of the first token: one for each expert
        >>> numbers.leading().tolist()
        >>> numbers.perplexities()
    """

    scalings: Float[Tensor, "token layer expert"]
    token_ids: Int[Tensor, " token"]
    log_probs: Float[Tensor, " token"]
    base_log_probs: Float[Tensor, " token"]
    pieces: tuple[str, ...]
    expert_names: tuple[str, ...]
    layer_names: tuple[str, ...]
    texts: tuple[TracedText, ...]
    title: str = ""
    num_left_out: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        sizes = {
            "tokens": len(self),
            "texts": len(self.texts),
            "layers": len(self.layer_names),
            "experts": len(self.expert_names),
        }
        return f"<weft.Trace {self.title!r}: {', '.join(f'{name} {size}' for name, size in sizes.items())}>"

    def weights(self) -> Float[Tensor, "token expert"]:
        """Each token's scalings, as the mean over the layers."""
        # Not scalings.float(): that is the whole trace a second time.
        return self.scalings.mean(1, dtype=torch.float32)

    def shares(self) -> Float[Tensor, "token expert"]:
        """What part of a token's weight is each expert's: max(0, w_e) / Σ max(0, w_i), w the mean over the layers.

        They sum to 1, whatever the gate's last function; they are 0 where no expert acts.
        """
        positive = self.weights().clamp(min=0)
        return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def leading(self) -> Int[Tensor, " token"]:
        """The number of the expert with the largest share."""
        return self.shares().argmax(-1)

    def entropy(self) -> Float[Tensor, "token layer"]:
        """How undecided the gate was: 0 for one expert alone, 1 for equal shares."""
        positive = self.scalings.float().clamp(min=0)
        return normalised_entropy(positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))

    def by_name(self) -> dict[str, Float[Tensor, " expert"]]:
        """The mean shares of each data set: the expert-by-domain matrix, a row per name."""
        shares = self.shares()
        rows: dict[str, list[Tensor]] = {}
        for text, start in self.starts():
            rows.setdefault(text.name, []).append(shares[start : start + text.num_tokens])
        return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}

    def starts(self) -> Iterator[tuple[TracedText, int]]:
        """Each text, and the index of its first token."""
        start = 0
        for text in self.texts:
            yield text, start
            start += text.num_tokens

    def perplexities(self) -> tuple[float, float] | None:
        """exp of the mean -ln p per predicted token, under the mixture and the base; None where none is predicted."""
        predicted = ~self.log_probs.isnan()
        if not predicted.any():
            return None
        mixture, base = (
            values[predicted].double().mean().neg().exp().item() for values in (self.log_probs, self.base_log_probs)
        )
        return mixture, base

    def head(self: _Own, num_tokens: int) -> _Own:
        """The first so many tokens."""
        if num_tokens >= len(self):
            return self
        texts = [
            TracedText(text.name, min(text.num_tokens, num_tokens - start), text.prompt_length)
            for text, start in self.starts()
            if start < num_tokens
        ]
        left_out = self.num_left_out + len(self) - num_tokens
        return self._part(torch.arange(len(self)) < num_tokens, texts, left_out)

    def only(self: _Own, name: str) -> _Own:
        """The texts of one data set."""
        texts = [text for text in self.texts if text.name == name]
        return self._part(
            torch.cat([torch.full((text.num_tokens,), text.name == name) for text in self.texts]), texts, 0
        )

    def _part(self: _Own, kept: Bool[Tensor, " token"], texts: list[TracedText], num_left_out: int) -> _Own:
        tensors: dict[str, Any] = {name: getattr(self, name)[kept] for name in TENSORS}
        pieces = tuple(compress(self.pieces, kept.tolist()))
        return replace(self, **tensors, pieces=pieces, texts=tuple(texts), num_left_out=num_left_out)

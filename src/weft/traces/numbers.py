"""The data of a trace, and quantities computed from it: shares, entropy, perplexities. No file and no screen."""

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
    """One text in a trace. Each text was read separately.

    Attributes:
        name: name of its data set; "" for none.
        num_tokens: number of its tokens in the trace.
        prompt_length: number of tokens before the generated ones; None if nothing was generated.
    """

    name: str
    num_tokens: int
    prompt_length: int | None = None


@dataclass(frozen=True, eq=False)
class TraceNumbers:
    """The scalings of texts, with their tokens and log-probabilities.

    Token t has the scalings λ_{t,l,e}, after top-k, of the position at which the model *reads* it. The model predicts
    the token at the position before. The axis `layer` has size 1 if all layers share the scalings. Padding is removed.

    Args:
        scalings: λ, as the layers used them.
        token_ids: the tokens of all texts, one text after the other.
        log_probs: ln p(token | earlier tokens of the text) of the mixture, in nats; NaN for the first token of each
            text, and for all tokens if the model is not causal.
        base_log_probs: the same for the base model (with the experts off).
        pieces: the text of each token; "" if a later token completes its character.
        expert_names: the experts in the order of the axis `expert`.
        layer_names: the layers in the order of the axis `layer`.
        texts: the texts, with their numbers of tokens.
        title: a title for display.
        num_left_out: number of the texts' tokens that are not in the trace, because of the limit.

    Example:
        >>> numbers = weft.trace(model, "The contract says", tokenizer=tokenizer)
        >>> numbers.shares()[0]  # the first token's share for each expert
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
        """The mean over the layers of each token's scalings."""
        # Not scalings.float(), which would copy the whole trace.
        return self.scalings.mean(1, dtype=torch.float32)

    def shares(self) -> Float[Tensor, "token expert"]:
        """Each expert's share of a token: max(0, w_e) / Σ_i max(0, w_i), with w from `weights`.

        The shares of a token sum to 1, also without a softmax in the gate; they are 0 if all weights are 0.
        """
        positive = self.weights().clamp(min=0)
        return positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def leading(self) -> Int[Tensor, " token"]:
        """The index of the expert with the largest share, for each token."""
        return self.shares().argmax(-1)

    def entropy(self) -> Float[Tensor, "token layer"]:
        """The normalised entropy of the scalings: 0 if one expert has the whole share, 1 for equal shares."""
        positive = self.scalings.float().clamp(min=0)
        return normalised_entropy(positive / positive.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))

    def by_name(self) -> dict[str, Float[Tensor, " expert"]]:
        """Data set -> the mean shares of its tokens."""
        shares = self.shares()
        rows: dict[str, list[Tensor]] = {}
        for text, start in self.starts():
            rows.setdefault(text.name, []).append(shares[start : start + text.num_tokens])
        return {name: torch.cat(parts).mean(0) for name, parts in rows.items()}

    def starts(self) -> Iterator[tuple[TracedText, int]]:
        """(text, index of its first token) for each text."""
        start = 0
        for text in self.texts:
            yield text, start
            start += text.num_tokens

    def perplexities(self) -> tuple[float, float] | None:
        """(perplexity of the mixture, perplexity of the base model); None if no token is predicted."""
        predicted = ~self.log_probs.isnan()
        if not predicted.any():
            return None
        mixture, base = (
            values[predicted].double().mean().neg().exp().item() for values in (self.log_probs, self.base_log_probs)
        )
        return mixture, base

    def head(self: _Own, num_tokens: int) -> _Own:
        """The trace of the first `num_tokens` tokens."""
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
        """The trace of one data set."""
        texts = [text for text in self.texts if text.name == name]
        return self._part(
            torch.cat([torch.full((text.num_tokens,), text.name == name) for text in self.texts]), texts, 0
        )

    def _part(self: _Own, kept: Bool[Tensor, " token"], texts: list[TracedText], num_left_out: int) -> _Own:
        tensors: dict[str, Any] = {name: getattr(self, name)[kept] for name in TENSORS}
        pieces = tuple(compress(self.pieces, kept.tolist()))
        return replace(self, **tensors, pieces=pieces, texts=tuple(texts), num_left_out=num_left_out)

"""Generation token by token, with what the experts had to do with each.

Three parts that know nothing of each other: `next_logits` reads tokens with the model and its cache, a `Sampler`
chooses, a `Detokeniser` makes text of it. `stream` puts them together.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from weft.detokeniser import Detokeniser
from weft.errors import CacheError, ConfigError
from weft.model import XLoraModel
from weft.sampling import Sampler, check_decoding


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: its id.
        text: the text that can be printed now, "" in the middle of a character; without special tokens, and always ""
            where `stream` was given no tokenizer.
        shares: expert name -> its weight, as the mean over the LoRA layers of the scalings that they followed (top-k
            applied) at the position that predicted this token: the one before it, which is the last token of the
            prompt for the first step. They sum to 1 where the gate ends in a softmax over all experts and all are kept.
            Inside `fixed_scalings` they are its weights; with the experts off there are none.
        finish_reason: None while there is more to come; "stop" at a token that ends the text, "length" after
            `max_new_tokens` or at the model's last position.

    Example:
        >>> step = next(weft.stream(model, "The contract", tokenizer=tokenizer))
        >>> step.text, step.shares
        (' says', {'code': 0.1, 'law': 0.9})
    """

    token: int
    text: str
    shares: dict[str, float]
    finish_reason: Literal["stop", "length"] | None = None


def stream(
    model: Any,
    prompt: str | Tensor,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    past_key_values: Cache | None = None,
) -> Generator[Step, None, None]:
    """Generate one text, step by step: the tokens of `model.generate` with the same options.

    Options are checked at once, the model runs when steps are asked for. Between two steps nothing is under way: the
    model may be used for something else, and the steps may end early.

    Args:
        model: a mixture, from `weft.from_adapters` or `weft.from_pretrained`.
        prompt: the whole text so far; a string needs a tokenizer, token ids are `[1, seq]`.
        tokenizer: makes tokens of the prompt and text of the tokens.
        max_new_tokens: at most so many steps; fewer where the model has no more positions.
        temperature: 0 takes the likeliest token; above 0 samples, the higher the freer.
        top_k: sample from so many of the likeliest tokens; None from all (whatever the generation config says).
        top_p: sample from the likeliest tokens of this total probability; None from all (likewise).
        repetition_penalty: 1 is none; None takes that of `model.generation_config`.
        seed: of the sampling, which does not touch torch's global random numbers; None starts anywhere.
        eos_token_id: tokens that end the text; None takes those of `model.generation_config`, [] is none.
        past_key_values: a cache to go on from and to go on with, filled in place: empty, or filled by this model with
            the beginning of the prompt, of which only the rest is read then. The last step's token is never in it. An
            exception in the middle of a step (Ctrl-C) empties it.

    Yields:
        A `Step` per token.

    Raises:
        ConfigError: an option, or the prompt, cannot work.
        CacheError: the model keeps no such cache, or this one holds no beginning of the prompt.

    Example:
        >>> for step in weft.stream(model, "The contract says", tokenizer=tokenizer, max_new_tokens=32):
        ...     print(step.text, end="", flush=True)
    """
    tuner = _mixture(model)
    check_decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if not tuner.backbone.caches:
        raise CacheError(
            f"model ({type(tuner.backbone.base).__name__}) keeps its state in something else than past_key_values, "
            "which stream needs: use model.generate(..., use_cache=False)"
        )
    input_ids = _token_ids(prompt, tokenizer).to(tuner.backbone.base.device)
    cache = tuner.backbone.empty_cache() if past_key_values is None else past_key_values
    max_new_tokens = _that_fit(max_new_tokens, tuner, input_ids, cache)
    defaults = tuner.backbone.base.generation_config
    if repetition_penalty is None:
        repetition_penalty = defaults.repetition_penalty or 1.0
    sampler = Sampler(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    return _steps(
        model,
        input_ids,
        cache,
        sampler=sampler,
        detokeniser=None if tokenizer is None else Detokeniser(tokenizer, input_ids[0].tolist()),
        ends=end_tokens(defaults.eos_token_id if eos_token_id is None else eos_token_id),
        max_new_tokens=max_new_tokens,
    )


def next_logits(model: Any, input_ids: Int[Tensor, "1 seq"], cache: Cache) -> Float[Tensor, "1 vocab"]:
    """Read the tokens that the cache lacks, put them into it, and give the logits of the token after them.

    An exception on the way empties the cache: some layers may have the new tokens by then, and others not.
    """
    options = {"logits_to_keep": 1} if _mixture(model).backbone.takes("logits_to_keep") else {}
    unread = input_ids[:, int(cache.get_seq_length()) :]
    try:
        # Not inference mode: what is in the cache then could not be used where gradients are wanted.
        with torch.no_grad():
            output = model(input_ids=unread, past_key_values=cache, use_cache=True, **options)
    except CacheError:
        raise  # refused before anything was read
    except BaseException:
        cache.reset()
        raise
    return output.logits[:, -1]


def end_tokens(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a text, as configs have them: none, one or several."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _steps(
    model: Any,
    input_ids: Int[Tensor, "1 seq"],
    cache: Cache,
    *,
    sampler: Sampler,
    detokeniser: Detokeniser | None,
    ends: frozenset[int],
    max_new_tokens: int,
) -> Generator[Step, None, None]:
    for number in range(1, max_new_tokens + 1):
        chosen = sampler(input_ids, next_logits(model, input_ids, cache))
        input_ids = torch.cat([input_ids, chosen[None]], dim=1)
        token = int(chosen)
        finish_reason: Literal["stop", "length"] | None = None
        if token in ends:
            finish_reason = "stop"
        elif number == max_new_tokens:
            finish_reason = "length"
        text = "" if detokeniser is None else detokeniser.add(token)
        if detokeniser is not None and finish_reason is not None:
            text += detokeniser.flush()
        yield Step(token, text, _shares(_mixture(model)), finish_reason)
        if finish_reason is not None:
            return


def _shares(tuner: XLoraModel) -> dict[str, float]:
    scalings = tuner.passes.last_position()
    if scalings is None:
        return {}
    return dict(zip(tuner.xlora_config.expert_names or (), scalings[0].mean(0).tolist(), strict=True))


def _mixture(model: Any) -> XLoraModel:
    tuner = model if isinstance(model, XLoraModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, XLoraModel):
        raise ConfigError(
            f"model ({type(model).__name__}) must be a mixture: make one with weft.from_adapters, or load one with "
            "weft.from_pretrained"
        )
    return tuner


def _token_ids(prompt: str | Tensor, tokenizer: Any) -> Int[Tensor, "1 seq"]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ConfigError(f"tokenizer (None) must be given with a prompt that is text ({prompt[:40]!r})")
        token_ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        if token_ids.shape[1] == 0:
            raise ConfigError(f"prompt ({prompt[:40]!r}) has no tokens, expected at least one to continue")
        return token_ids
    if prompt.dim() != 2 or prompt.shape[0] != 1 or prompt.shape[1] == 0 or prompt.dtype != torch.long:
        raise ConfigError(
            f"prompt ({prompt.dtype} of shape {list(prompt.shape)}) must be token ids, torch.int64 of shape [1, seq] "
            "with at least one: stream generates one text at a time"
        )
    return prompt


def _that_fit(max_new_tokens: int, tuner: XLoraModel, input_ids: Tensor, cache: Cache) -> int:
    """`max_new_tokens`, or fewer where the model has no positions to read them at."""
    length, cached = input_ids.shape[1], int(cache.get_seq_length())
    if cached >= length:
        raise CacheError(
            f"past_key_values ({cached} tokens) must be shorter than the prompt ({length} tokens), which is the whole "
            "text, the cached beginning included: crop it, or start again with an empty cache"
        )
    positions = getattr(tuner.backbone.base.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if length > positions:
        raise ConfigError(
            f"prompt ({length} tokens) must be at most the model's number of positions ({positions}): shorten it"
        )
    return min(max_new_tokens, positions - length + 1)  # the last one is not read

"""Generation token by token, with each expert's share.

A `Reader` runs the model with a KV cache, a `Sampler` chooses the token, a `Detokenizer` converts it to text. `stream`
combines them.

With `speculate`, one call also reads drafted tokens, and the sampler chooses a token at each position. If it chooses
the drafted token, the next position is used too. So the tokens, or their distribution with sampling, are those of plain
decoding for any draft. This is speculative sampling (arXiv 2211.17192) for drafts without probabilities, which are
accepted with the probability that the model gives them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import Cache

from weft.base_model.backbone import vocabulary_size
from weft.base_model.devices import execution_device
from weft.base_model.versions import can_crop, keep_for_crop
from weft.data.given import Given, some_tokens
from weft.data.texts import num_positions
from weft.errors import CacheError, ConfigError
from weft.generation.detokenizer import Detokenizer
from weft.generation.reader import Reader, tuner_of
from weft.generation.sampling import Sampler, check_decoding
from weft.generation.speculation import Speculation
from weft.model.model import XLoraModel
from weft.passes.cache import tokens_in


@dataclass(frozen=True)
class Step:
    """One generated token.

    Attributes:
        token: the token id.
        text: the text that can be printed now, without special tokens; "" inside a character, or without a tokenizer.
        shares: expert name -> its scaling after top-k, as the mean over the LoRA layers, at the position that predicted
            this token (the token before it). The shares sum to 1 if the gate has a softmax over all experts and keeps
            all of them. In `fixed_scalings` they are its weights; with the experts off, the dict is empty.
        guessed: whether the token was an accepted draft of `speculate`, so that it needed no further call.
        finish_reason: None if more tokens follow; "stop" at an end token, "length" at `max_new_tokens` or at the
            model's last position.

    Example:
        >>> step = next(weft.stream(model, "The contract", tokenizer=tokenizer))
        >>> step.text, step.shares
        (' says', {'code': 0.1, 'law': 0.9})
    """

    token: int
    text: str
    shares: dict[str, float]
    guessed: bool = False
    finish_reason: Literal["stop", "length"] | None = None


def stream(
    model: Any,
    prompt: Given,
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
    speculate: int = 0,
    freeze_scalings_after: int | None = None,
) -> Generator[Step, None, None]:
    """Generate one text, step by step. The tokens are those of `model.generate` with the same options.

    The options are checked immediately; the model runs when a step is requested. Between two steps the model can be
    used otherwise, and the generator can be closed early.

    Args:
        model: a mixture, from `weft.from_adapters` or `weft.from_pretrained`.
        prompt: the whole text so far: a string, or a row with "text" or "messages", which need a tokenizer; or token
            ids `[seq]` or `[1, seq]`, or a row with `input_ids`.
        tokenizer: tokenizer for the prompt and the text of the steps.
        max_new_tokens: maximum number of steps; fewer if the model has no more positions.
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / temperature).
        top_k: sample only from this number of most likely tokens; None samples from all, whatever the generation config
            has.
        top_p: sample only from the most likely tokens with this total probability; None samples from all, whatever the
            generation config has.
        repetition_penalty: 1 for none; None takes the one in `model.generation_config`.
        seed: seed of the sampling, which does not change torch's global random state; None takes a random seed.
        eos_token_id: tokens that end the text; None takes those of `model.generation_config`, [] means none.
        past_key_values: a KV cache, which is extended in place. It must be empty, or filled by this model with the
            beginning of the prompt, which is then not read again. It never has the token of the last step. An exception
            during a step (Ctrl-C) empties it.
        speculate: maximum number of tokens to draft in a call, from n-grams of the text and with the scaling pass, if
            that saves time; 0 for none. The tokens do not change.
        freeze_scalings_after: run the gate only for the prompt and this number of new tokens. From then on the text
            uses the mean of its scalings, and a token needs one pass. None never freezes. Excludes `speculate`.

    Yields:
        A `Step` for each token.

    Raises:
        ConfigError: an option or the prompt is not valid.
        CacheError: the model does not use such a cache, or the cache does not have the beginning of the prompt.
        ThreadError: another thread is using the model.

    Example:
        >>> for step in weft.stream(model, "The contract says", tokenizer=tokenizer, max_new_tokens=32):
        ...     print(step.text, end="", flush=True)
    """
    tuner = tuner_of(model)
    check_decoding(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    if tuner.backbone.is_encoder_decoder:
        raise ConfigError(
            f"model ({type(tuner.backbone.base).__name__}) is an encoder-decoder, whose text does not go on from its "
            "prompt: use model.generate"
        )
    if not tuner.backbone.caches:
        raise CacheError(
            f"model ({type(tuner.backbone.base).__name__}) keeps its state in no cache of transformers' own, which "
            "stream needs: use model.generate(..., use_cache=False)"
        )
    vocabulary = vocabulary_size(tuner.backbone.base)
    input_ids = torch.tensor([some_tokens(prompt, "prompt", tokenizer, is_prompt=True, vocabulary=vocabulary)])
    input_ids = input_ids.to(execution_device(tuner.backbone.base))
    cache = tuner.backbone.empty_cache() if past_key_values is None else past_key_values
    max_new_tokens = _that_fit(max_new_tokens, tuner, input_ids, cache)
    _check_shortcuts(tuner, cache, speculate, freeze_scalings_after)
    defaults = tuner.backbone.base.generation_config
    if repetition_penalty is None:
        repetition_penalty = defaults.repetition_penalty or 1.0
    sampler = Sampler(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    if speculate:
        keep_for_crop(cache)
    return _steps(
        Reader(model, cache, None if freeze_scalings_after is None else input_ids.shape[1] + freeze_scalings_after),
        input_ids,
        sampler=sampler,
        detokenizer=None if tokenizer is None else Detokenizer(tokenizer, input_ids[0].tolist()),
        ends=end_tokens(defaults.eos_token_id if eos_token_id is None else eos_token_id),
        max_new_tokens=max_new_tokens,
        speculation=Speculation(tuner, cache, input_ids[0].tolist(), speculate) if speculate else None,
    )


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        tokens: the ids of the new tokens.
        text: the text of the new tokens; "" without a tokenizer.
        finish_reason: "stop" at an end token, "length" at `max_new_tokens` or at the model's last position.
        num_calls: number of calls of the model; less than `len(tokens)` if drafts of `speculate` were accepted.

    Example:
        >>> generation = weft.generate(model, "The contract says", tokenizer=tokenizer, max_new_tokens=32)
        >>> generation.text, generation.finish_reason
    """

    tokens: list[int]
    text: str
    finish_reason: Literal["stop", "length"]
    num_calls: int


def generate(model: Any, prompt: Given, **options: Any) -> Generation:
    """Generate one text: all steps of `stream` together.

    For batches, beam search and other features of transformers' `generate`, use `model.generate`.

    Args:
        model: a mixture.
        prompt: the whole text so far, as in `stream`.
        **options: the options of `stream`; `speculate=8` for speed.

    Returns:
        The `Generation`.

    Raises:
        ConfigError, CacheError, ThreadError: as in `stream`.

    Example:
        >>> weft.generate(model, "The contract says", tokenizer=tokenizer, max_new_tokens=32, speculate=8).text
        ' that the party of the first part'
    """
    steps = list(stream(model, prompt, **options))
    assert steps[-1].finish_reason is not None
    return Generation(
        tokens=[step.token for step in steps],
        text="".join(step.text for step in steps),
        finish_reason=steps[-1].finish_reason,
        num_calls=sum(not step.guessed for step in steps),
    )


def end_tokens(eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The end tokens as a set, from the value in a config: None, one token, or several."""
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)


def _steps(
    reader: Reader,
    input_ids: Int[Tensor, "1 seq"],
    *,
    sampler: Sampler,
    detokenizer: Detokenizer | None,
    ends: frozenset[int],
    max_new_tokens: int,
    speculation: Speculation | None,
) -> Generator[Step, None, None]:
    number = 0
    finish_reason: Literal["stop", "length"] | None = None
    while finish_reason is None:
        logits, drafted = reader.read(input_ids, speculation, max_new_tokens - number - 1)
        steps: list[Step] = []
        for index in range(len(drafted) + 1):
            chosen = sampler(input_ids, logits[:, index])
            input_ids = torch.cat([input_ids, chosen[None]], dim=1)
            token, number = int(chosen), number + 1
            finish_reason = "stop" if token in ends else "length" if number == max_new_tokens else None
            text = "" if detokenizer is None else detokenizer.add(token)
            if detokenizer is not None and finish_reason is not None:
                text += detokenizer.flush()
            steps.append(Step(token, text, reader.shares(index), index > 0, finish_reason))
            if finish_reason is not None or drafted[index : index + 1] != [token]:
                break
        if speculation is not None:
            reader.forget(len(drafted) - len(steps) + 1)
            speculation.note(len(steps) - 1, len(drafted), [step.token for step in steps])
        for given, step in enumerate(steps, 1):
            try:
                yield step
            except GeneratorExit:
                if given < len(steps):
                    reader.forget(len(steps) - given)  # tokens that were not yielded
                raise


def _check_shortcuts(tuner: XLoraModel, cache: Cache, speculate: int, freeze_scalings_after: int | None) -> None:
    """Raise if `speculate` or `freeze_scalings_after` is not valid."""
    if isinstance(speculate, bool) or not isinstance(speculate, int) or speculate < 0:
        raise ConfigError(f"speculate ({speculate!r}) must be a whole number of at least 0: tokens to guess ahead")
    if freeze_scalings_after is not None:
        tuner.passes.check_frozen_scalings(freeze_scalings_after, {"speculate": speculate or None})
    if speculate and not can_crop(cache):
        raise ConfigError(
            f"speculate ({speculate}) needs a cache that can forget wrong guesses, which {type(cache).__name__} "
            "cannot: use a dynamic cache"
        )


def _that_fit(max_new_tokens: int, tuner: XLoraModel, input_ids: Tensor, cache: Cache) -> int:
    """`max_new_tokens`, or fewer if the model does not have so many positions."""
    length, cached = input_ids.shape[1], tokens_in(cache)
    if cached >= length:
        raise CacheError(
            f"past_key_values ({cached} tokens) must be shorter than the prompt ({length} tokens), which is the whole "
            "text, the cached beginning included: crop it, or start again with an empty cache"
        )
    positions = num_positions(tuner.backbone.base.config)
    if positions is None:
        return max_new_tokens
    if length > positions:
        raise ConfigError(
            f"prompt ({length} tokens) must be at most the model's number of positions ({positions}): shorten it"
        )
    return min(max_new_tokens, positions - length + 1)  # the last token needs no position

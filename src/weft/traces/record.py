"""Records traces: runs a mixture on texts, and keeps the scalings of its layers and the log-probabilities.

Each text is read once by the mixture and once by the base model, without a KV cache. For a generation, the finished
text is read again: in a causal model the scalings are the same as during the generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.base_model.backbone import vocabulary_size
from weft.base_model.devices import execution_device
from weft.base_model.likelihoods import negative_log_likelihoods
from weft.data.chat_template import refuse_half_characters
from weft.data.given import Given, check_tokenizer, check_vocabulary, given_tokens, several, some_tokens
from weft.data.padded import padded_batches
from weft.data.texts import check_length, num_positions, read_tokens
from weft.data.windows import opening_length, opening_of, spans, token_sequences, window
from weft.errors import ConfigError, DataError
from weft.generation.detokenizer import Detokenizer
from weft.generation.reader import tuner_of
from weft.generation.stream import stream
from weft.model.model import XLoraModel
from weft.traces.trace import Trace, TracedText

# With 210 layers and 16 experts, 4,096 tokens need 28 MB.
MAX_TOKENS = 4096


def trace(
    model: Any,
    text: Given,
    *,
    tokenizer: Any = None,
    title: str = "",
    max_tokens: int = MAX_TOKENS,
) -> Trace:
    """Record the gate's scalings for a text.

    Args:
        model: a mixture in evaluation mode. In `fixed_scalings`, the fixed weights are recorded.
        text: a string, or a row with "text" or "messages" as in data files, which need a tokenizer; or token ids ([seq]
            or [1, seq]), or a row with `input_ids`.
        tokenizer: tokenizer for the text; without it, tokens are shown by their ids.
        title: a title for display.
        max_tokens: maximum number of tokens in the trace, from the start. A text with more tokens than the model has
            positions is read in parts, each of which begins with what the tokenizer puts before a text.

    Returns:
        The `Trace`.

    Raises:
        ConfigError: the model is an encoder-decoder or its experts are off, or the text is of another kind or has no
            tokens.
        DataError: the text or the title contains half of a character (a lone surrogate).

    Example:
        >>> trace = weft.trace(model, "The contract says", tokenizer=tokenizer)
        >>> trace.scalings.shape  # [token, layer, expert]
    """
    tuner = _checked(model, max_tokens, title)
    token_ids = some_tokens(text, "text", tokenizer, vocabulary=vocabulary_size(tuner.backbone.base))
    length = num_positions(tuner.backbone.base.config) or max(2, len(token_ids))  # a text can be of one token
    before = opening_length(token_ids, opening_of(tokenizer))
    parts = spans(len(token_ids), length, before, least=1)
    texts = [("", window(token_ids, start, end, before)) for start, end in parts]
    return _record(tuner, texts, tokenizer, title=title, max_tokens=max_tokens, batch_size=1)


def trace_data(
    model: Any,
    data: Mapping[str, str | Sequence[Given]],
    *,
    tokenizer: Any,
    title: str = "",
    max_tokens: int = MAX_TOKENS,
    sequence_length: int = 512,
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda done: None,
) -> Trace:
    """Record the gate's scalings for several data sets, with the same number of tokens for each.

    Args:
        model: a mixture in evaluation mode.
        data: name -> file (as for `weft train`), or a list of what `trace` takes.
        tokenizer: the base model's tokenizer.
        title: a title for display.
        max_tokens: maximum number of tokens in the trace; the first tokens of each data set are taken.
        sequence_length: number of tokens per sequence; longer texts are split, and each part begins with what the
            tokenizer puts before a text, such as `<bos>`.
        batch_size: number of sequences per forward pass.
        advance: called after each forward pass with its number of tokens.

    Returns:
        The `Trace`.

    Raises:
        ConfigError: as in `trace`.
        DataError: the data cannot be read.

    Example:
        >>> trace = weft.trace_data(model, {"code": "code.jsonl", "law": "law.jsonl"}, tokenizer=tokenizer)
        >>> trace.by_name()  # {"code": [expert], "law": [expert]}
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"data ({type(data).__name__}) must be a table of data sets: {{name: file or list of texts}}")
    tuner = _checked(model, max_tokens, title, *data)
    if not data:
        raise DataError("data is empty: give a name and a file, or texts, for each data set")
    if batch_size < 1:
        raise ConfigError(f"batch_size ({batch_size}) must be at least 1")
    check_length(sequence_length, tuner.backbone.base.config)
    check_tokenizer(tokenizer)
    limit, left_out = max(1, max_tokens // len(data)), 0
    texts: list[tuple[str, list[int]]] = []
    for name, source in data.items():
        found = _tokens_of(name, source, tokenizer, vocabulary_size(tuner.backbone.base))
        kept, beyond = _first(token_sequences(found, sequence_length, opening_of(tokenizer)), limit)
        texts += [(name, sequence) for sequence in kept]
        left_out += beyond
    return _record(
        tuner,
        texts,
        tokenizer,
        title=title,
        max_tokens=max(max_tokens, limit * len(data)),
        batch_size=batch_size,
        left_out=left_out,
        advance=advance,
    )


def trace_generation(
    model: Any,
    prompt: Given,
    *,
    tokenizer: Any = None,
    title: str = "",
    max_tokens: int = MAX_TOKENS,
    **options: Any,
) -> Trace:
    """Let the mixture continue a prompt, and record the gate's scalings for the prompt and the new tokens.

    Args:
        model: a mixture in evaluation mode.
        prompt: the text to continue, as in `weft.stream`.
        tokenizer: as in `trace`.
        title: a title for display.
        max_tokens: maximum number of tokens in the trace, from the start.
        **options: the options of `weft.stream`, except `past_key_values` and `freeze_scalings_after`.

    Returns:
        The `Trace`.

    Raises:
        ConfigError: as in `trace`, or an option is not valid.

    Example:
        >>> trace = weft.trace_generation(model, "The contract says", tokenizer=tokenizer, max_new_tokens=32)
    """
    tuner = _checked(model, max_tokens, title)
    for name in ("past_key_values", "freeze_scalings_after"):
        if options.get(name) is not None:
            raise ConfigError(
                f"{name} ({options[name]!r}) cannot be traced, as the text is read again from its beginning to its "
                "end: leave it out"
            )
    options.pop("freeze_scalings_after", None)
    prompt_ids = some_tokens(prompt, "prompt", tokenizer, is_prompt=True)
    steps = stream(model, torch.tensor([prompt_ids]), tokenizer=tokenizer, **options)
    token_ids = prompt_ids + [step.token for step in steps]
    # A last token beyond the model's positions is not read, so it has no scalings.
    length = num_positions(tuner.backbone.base.config) or len(token_ids)
    return _record(
        tuner,
        [("", token_ids[:length])],
        tokenizer,
        title=title,
        max_tokens=max_tokens,
        batch_size=1,
        prompt_length=len(prompt_ids),
    )


def _checked(model: Any, max_tokens: int, *names: str) -> XLoraModel:
    tuner = tuner_of(model)
    refuse_half_characters(names)
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ConfigError(f"max_tokens ({max_tokens!r}) must be a whole number of at least 1")
    if tuner.backbone.is_encoder_decoder:
        raise ConfigError(
            f"the base model ({type(tuner.backbone.base).__name__}) is an encoder-decoder, whose layers do not all "
            "follow the same tokens: expected a decoder or an encoder; model.get_latest_scalings() has the target's"
        )
    if tuner.disabled:
        raise ConfigError("the experts are off (disable_adapter), so that there is nothing to trace: leave it first")
    return tuner


def _tokens_of(name: str, source: str | Sequence[Given], tokenizer: Any, vocabulary: int | None) -> list[list[int]]:
    """The token ids of each text of a data set."""
    if not isinstance(source, str):
        texts = enumerate(several(source, f"data of {name}"))
        return [
            given_tokens(text, f"text {number} of {name}", tokenizer, vocabulary=vocabulary) for number, text in texts
        ]
    if tokenizer is None:
        raise ConfigError(f"tokenizer (None) must be given with a file ({source})")
    found = read_tokens(source, tokenizer)
    for tokens in found:
        check_vocabulary(tokens, f"data ({source})", vocabulary)
    return found


def _first(sequences: Iterable[list[int]], limit: int) -> tuple[list[list[int]], int]:
    """(sequences with the first `limit` tokens, number of the other tokens)."""
    kept: list[list[int]] = []
    beyond = 0
    for sequence in sequences:
        part = sequence[:limit]
        limit -= len(part)
        beyond += len(sequence) - len(part)
        if part:
            kept.append(part)
    return kept, beyond


@torch.no_grad()
def _record(
    tuner: XLoraModel,
    texts: list[tuple[str, list[int]]],
    tokenizer: Any,
    *,
    title: str,
    max_tokens: int,
    batch_size: int,
    prompt_length: int | None = None,
    left_out: int = 0,
    advance: Callable[[int], None] = lambda done: None,
) -> Trace:
    sequences, beyond = _first((sequence for _, sequence in texts), max_tokens)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for input_ids, attention_mask in padded_batches(sequences, batch_size):
        parts.append(_read(tuner, input_ids, attention_mask))
        advance(int(attention_mask.sum()))
    scalings, log_probs, base_log_probs = (torch.cat(values) for values in zip(*parts, strict=True))
    options = tuner.xlora_config
    layer_names = options.layer_names or []
    return Trace(
        scalings=scalings,
        token_ids=torch.tensor([token for sequence in sequences for token in sequence]),
        log_probs=log_probs,
        base_log_probs=base_log_probs,
        pieces=tuple(piece for sequence in sequences for piece in _pieces(sequence, tokenizer)),
        expert_names=tuple(options.expert_names or ()),
        layer_names=tuple(layer_names) if scalings.shape[1] == len(layer_names) else ("all layers",),
        texts=tuple(
            TracedText(name, len(sequence), prompt_length)
            for (name, _), sequence in zip(texts[: len(sequences)], sequences, strict=True)
        ),
        title=title,
        num_left_out=left_out + beyond,
    )


def _read(
    tuner: XLoraModel, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
) -> tuple[Tensor, Tensor, Tensor]:
    """(scalings, log-probabilities of mixture and base model) of the tokens of a batch, without padding."""
    device, present = execution_device(tuner.backbone.base), attention_mask.bool()
    arguments: dict[str, Any] = {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
    }
    if tuner.backbone.takes("use_cache"):
        arguments["use_cache"] = False
    output = tuner(**arguments)
    followed = tuner.passes.followed()
    assert followed is not None
    scalings = followed.expand(*input_ids.shape, -1, -1)[present.to(followed.device)].half().cpu()
    log_probs = _log_probs(tuner, output, arguments["input_ids"])[present]
    tuner.disable_adapter_layers()
    try:
        base_log_probs = _log_probs(tuner, tuner(**arguments), arguments["input_ids"])[present]
    finally:
        tuner.enable_adapter_layers()
    return scalings, log_probs, base_log_probs


def _log_probs(tuner: XLoraModel, output: Any, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """ln p(token | earlier tokens); NaN for the first token, and for all if the model is not causal."""
    found = torch.full(input_ids.shape, torch.nan)
    if tuner.backbone.shifts_labels:
        found[:, 1:] = -negative_log_likelihoods(output.logits, input_ids).cpu()
    return found


def _pieces(token_ids: list[int], tokenizer: Any) -> list[str]:
    """The text of each token, with the names of special tokens; together they are the whole text."""
    if tokenizer is None:
        return [f"#{token} " for token in token_ids]
    detokenizer, special = Detokenizer(tokenizer), set(tokenizer.all_special_ids)
    pieces = [detokenizer.add(token) for token in token_ids]
    for index, token in enumerate(token_ids):
        if token in special and not pieces[index]:
            pieces[index] = str(tokenizer.convert_ids_to_tokens(token))
    pieces[-1] += detokenizer.flush()
    return pieces

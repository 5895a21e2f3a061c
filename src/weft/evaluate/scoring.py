"""The scores of one model on one data set, for each part of each example."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from weft.base_model.backbone import vocabulary_size
from weft.base_model.devices import execution_device
from weft.base_model.likelihoods import negative_log_likelihoods
from weft.data.given import Given, several, some_tokens
from weft.data.padded import padded_batches
from weft.errors import DataError
from weft.evaluate.data_sets import DataSet, windows_of
from weft.generation.stream import end_tokens

# (sum, weight) for each part: negative log-likelihood in nats and number of tokens, or 1 if right and 1.
Scores = list[tuple[float, float]]
Advance = Callable[[int], None]


def _ignore(done: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Runner:
    """A model and how to run it.

    Args:
        model: called like a causal language model of transformers.
        tokenizer: the base model's tokenizer.
        batch_size: number of sequences per forward pass.
        freeze_after: freeze a mixture's scalings after this number of tokens of a text, or after a prompt; None never
            freezes.
    """

    model: Any
    tokenizer: Any = None
    batch_size: int = 4
    freeze_after: int | None = None

    def logits(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq vocab"]:
        """The logits of one batch of sequences."""
        if self.freeze_after is None:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        parts, cache = [], None
        length, cache_name = input_ids.shape[1], str(self.model.base_model.backbone.cache_name)
        with self.model.base_model.passes.freeze_scalings_at(self.freeze_after):
            for start, end in ((0, min(self.freeze_after, length)), (self.freeze_after, length)):
                if start < end:
                    output = self.model(
                        input_ids=input_ids[:, start:end],
                        attention_mask=attention_mask[:, :end],
                        use_cache=True,
                        **{cache_name: cache},
                    )
                    cache = output[cache_name]
                    parts.append(output.logits)
        return torch.cat(parts, 1)

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt."""
        longest = max(len(prompt) for prompt in prompts)
        pad = self.tokenizer.pad_token_id
        rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = execution_device(self.model)
        # Frozen after the prompt, so that the whole answer is generated with frozen scalings.
        frozen = {} if self.freeze_after is None else {"freeze_scalings_after": 0}
        # The base model's end of text, and the tokenizer's end of a message.
        ends = end_tokens(self.model.generation_config.eos_token_id) | end_tokens(self.tokenizer.eos_token_id)
        output = self.model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
            **frozen,
        )
        return self.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


@torch.no_grad()
def score(runner: Runner, data: DataSet, advance: Advance = _ignore) -> Scores:
    """The scores of all parts of the data set, in its order."""
    if data.metric == "accuracy":
        return _choices(runner, data, advance)
    if data.metric == "exact_match":
        return _answers(runner, data, advance)
    return _texts(runner, data, advance)


def value_of(data: DataSet, total: float, weight: float) -> float:
    """The metric, from the sum and weight of all scores; NaN if the weight is 0."""
    if weight == 0:
        return math.nan
    return _exp(total / weight) if data.metric == "perplexity" else total / weight


def _exp(mean: float) -> float:
    """e to the mean; infinity if it is larger than a float can be."""
    return math.inf if mean > math.log(sys.float_info.max) else math.exp(mean)


def _texts(runner: Runner, data: DataSet, advance: Advance) -> Scores:
    """The sum of the negative log-likelihoods and the number of scored tokens of each part."""
    offsets = [data.example_of_part.index(number) for number in range(len(data.examples))]
    sums = torch.zeros(len(data.labels), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    plan = [(number, window) for number, text in enumerate(data.examples) for window in text.windows]
    losses = token_losses(runner, windows_of(data), advance)
    for (number, window), of_window in zip(plan, losses, strict=True):
        text = data.examples[number]
        before = window.first - window.start + (text.opening if window.start else 0)
        scored = of_window[before - 1 :].double()
        parts = torch.tensor(text.parts[window.first : window.end]) + offsets[number]
        sums.index_add_(0, parts, scored)
        counts.index_add_(0, parts, torch.ones_like(scored))
    return list(zip(sums.tolist(), counts.tolist(), strict=True))


def _choices(runner: Runner, data: DataSet, advance: Advance) -> Scores:
    """1 if the right choice has the highest log-likelihood per character, else 0; NaN if one of them is NaN."""
    sequences = [sequence for example in data.examples for sequence in example.sequences]
    losses = token_losses(runner, sequences)
    found: Scores = []
    for example in data.examples:
        likelihoods = [
            -float(next(losses)[first - 1 :].double().sum()) / length
            for first, length in zip(example.firsts, example.lengths, strict=True)
        ]
        undecided = any(map(math.isnan, likelihoods))
        right = likelihoods.index(max(likelihoods)) == example.answer
        found.append((math.nan if undecided else float(right), 1.0))
        advance(1)
    return found


def _answers(runner: Runner, data: DataSet, advance: Advance) -> Scores:
    """1 if the generated text is one of the answers, else 0."""
    found: Scores = []
    for start in range(0, len(data.examples), runner.batch_size):
        batch = data.examples[start : start + runner.batch_size]
        texts = runner.generate([example.tokens for example in batch], data.max_new_tokens)
        found += [(float(is_answer(text, example.answers)), 1.0) for text, example in zip(texts, batch, strict=True)]
        advance(len(batch))
    return found


def is_answer(text: str, answers: list[str]) -> bool:
    """Whether a generated text is one of the answers, without spaces around it.

    For an answer of one line, only the first line of the text is compared.
    """
    text = text.strip()
    first_line = text.partition("\n")[0].strip()
    return any(answer.strip() == (text if "\n" in answer.strip() else first_line) for answer in answers)


def token_losses(runner: Runner, sequences: list[list[int]], advance: Advance = _ignore) -> Iterator[Tensor]:
    """For each sequence, the negative log-likelihoods of all tokens except the first, in nats; float32 on the CPU."""
    device = execution_device(runner.model)
    for input_ids, attention_mask in padded_batches(sequences, runner.batch_size):
        with torch.no_grad():
            logits = runner.logits(input_ids.to(device), attention_mask.to(device))
            losses = negative_log_likelihoods(logits, input_ids).cpu()
        for row, length in zip(losses, attention_mask.sum(1).tolist(), strict=True):
            yield row[: length - 1]
        advance(len(input_ids))


def perplexity(
    model: Any,
    sequences: Sequence[Given],
    batch_size: int,
    *,
    tokenizer: Any = None,
    freeze_after: int | None = None,
) -> float:
    """The perplexity of a model on token sequences.

        exp( mean of -ln p(token | earlier tokens) )        over all tokens except the first of each sequence

    Padding is not in the mean. The log-likelihoods are in float32, their sum is in float64.

    Args:
        model: called like a causal language model of transformers, in evaluation mode.
        sequences: token ids of each sequence, or, with a tokenizer, texts (see `weft.trace`).
        batch_size: number of sequences per forward pass.
        tokenizer: tokenizer of the base model, for texts.
        freeze_after: see `Runner`.

    Raises:
        ConfigError: a sequence is something else.
        DataError: no sequence has two tokens.

    Example:
        >>> perplexity(model, ["The contract says", "def f(x):"], batch_size=2, tokenizer=tokenizer)
    """
    vocabulary = vocabulary_size(model)
    rows = [
        some_tokens(given, f"sequence {number}", tokenizer, vocabulary=vocabulary)
        for number, given in enumerate(several(sequences, "sequences"))
    ]
    losses = list(token_losses(Runner(model, batch_size=batch_size, freeze_after=freeze_after), rows))
    number = sum(len(loss) for loss in losses)
    if not number:
        raise DataError("sequences hold no text of two tokens or more: there is no token to predict")
    return _exp(sum(float(loss.double().sum()) for loss in losses) / number)

"""Chooses the next token from the logits of one position.

The logits processors are those of transformers, in the order of `generate`. The sampler has its own random generator,
so that the result for a seed does not depend on other random numbers in the program.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from weft.errors import ConfigError, WeftError
from weft.files.reading import is_number, is_whole, shown
from weft.gate.routing import LOWEST_TEMPERATURE
from weft.options.text import decoding_problems


def check_decoding(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise if an option is not valid.

    Raises:
        ConfigError: one or more options are out of range; all at once.
    """
    problems = decoding_problems(max_new_tokens, temperature, top_k, top_p)
    if problems:
        raise ConfigError("the options of decoding cannot work:", problems)


class Sampler:
    """Chooses the next token: the most likely one, or a sample.

    Args:
        temperature: 0 takes the most likely token; above 0 samples from softmax(logits / temperature).
        top_k: sample only from this number of most likely tokens; None samples from all.
        top_p: sample only from the smallest set of most likely tokens with this total probability; None from all.
        repetition_penalty: transformers' penalty for tokens that are in the text already; 1 for none.
        seed: seed of the random generator; None takes a random seed.

    Raises:
        ConfigError: the penalty or the seed is out of range; or, at a token, these options leave no probabilities.
        WeftError: the logits of a token are NaN or infinite.

    Example:
        >>> sampler = Sampler(temperature=0.8, top_p=0.95, seed=0)
        >>> sampler(torch.tensor([[5, 7]]), torch.zeros(1, 96)).shape  # input_ids [1, seq], logits [1, vocab]
        torch.Size([1])
    """

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        if not is_number(repetition_penalty) or repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty ({shown(repetition_penalty)}) must be a finite number above 0")
        if seed is not None and not is_whole(seed):
            raise ConfigError(f"seed ({shown(seed)}) must be a whole number, or None")
        self.greedy = temperature == 0
        self.temperature, self.repetition_penalty = temperature, repetition_penalty
        self.seed = seed
        self.processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if self.greedy:
            return
        if temperature != 1:
            self.processors.append(TemperatureLogitsWarper(max(float(temperature), LOWEST_TEMPERATURE)))
        if top_k is not None:
            self.processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            self.processors.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, input_ids: Int[Tensor, "1 seq"], logits: Float[Tensor, "1 vocab"]) -> Int[Tensor, "1"]:
        """The token after `input_ids`; `logits` are the model's at their last position."""
        # NaN is the largest number to `max`, and the most likely token to `argmax`.
        if not logits.max().isfinite():
            raise WeftError(
                f"the model's logits are NaN or infinite after {input_ids.shape[-1]} tokens: look at the adapters' "
                "weights and at the base model's dtype"
            )
        # LogitsProcessorList has no useful return type.
        scores: Tensor = self.processors(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
        if not scores.max().isfinite():
            raise ConfigError(
                f"temperature ({self.temperature:g}) and repetition_penalty ({self.repetition_penalty:g}) leave no "
                "probabilities to sample from: use values nearer to 1"
            )
        if self.greedy:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), 1, generator=self._random(scores.device))[:, 0]

    def _random(self, device: torch.device) -> torch.Generator:
        if self._generator is None:
            self._generator = torch.Generator(device)
            if self.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.seed)
        return self._generator

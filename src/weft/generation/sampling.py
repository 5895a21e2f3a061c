"""From the logits of one position to the next token; knows nothing of models.

The processors are transformers' own, in the order in which `generate` applies them. The random numbers come from a
generator of the sampler's own, so that a seed means the same whatever else the program draws.
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

from weft.errors import ConfigError
from weft.files.reading import is_number, is_whole, shown


def check_decoding(*, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise where these options cannot work; the command line asks before it loads a model.

    Raises:
        ConfigError: one or more are out of range; all are named.
    """
    problems = []
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        problems.append(f"max_new_tokens ({shown(max_new_tokens)}) must be at least 1")
    if not is_number(temperature) or temperature < 0:
        problems.append(
            f"temperature ({shown(temperature)}) must be a finite number of at least 0, where 0 does not sample"
        )
    if top_k is not None and (not is_whole(top_k) or top_k < 1):
        problems.append(f"top_k ({shown(top_k)}) must be at least 1: leave it out to sample from all tokens")
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        problems.append(f"top_p ({shown(top_p)}) must be above 0 and at most 1: leave it out to sample from all tokens")
    if problems:
        raise ConfigError("the options of decoding cannot work:", problems)


class Sampler:
    """Chooses the next token: the likeliest, or a random one.

    Args:
        temperature: 0 takes the likeliest token; above 0 samples from softmax(logits / temperature).
        top_k: sample from so many of the likeliest tokens only; None from all.
        top_p: sample from the fewest of the likeliest tokens that have this probability together; None from all.
        repetition_penalty: transformers' factor against tokens that the text has already; 1 is none.
        seed: of the random numbers; None starts anywhere.

    Raises:
        ConfigError: the penalty or the seed is out of range.

    Example:
        >>> sampler = Sampler(temperature=0.8, top_p=0.95, seed=0)
        >>> sampler(input_ids, logits)  # input_ids [1, seq], logits [1, vocab]
        tensor([42])
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
        self.seed = seed
        self.processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty)))
        if self.greedy:
            return
        if temperature != 1:
            self.processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            self.processors.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            self.processors.append(TopPLogitsWarper(float(top_p)))

    def __call__(self, input_ids: Int[Tensor, "1 seq"], logits: Float[Tensor, "1 vocab"]) -> Int[Tensor, "1"]:
        """The token after `input_ids`, of which `logits` are the model's."""
        # The type is that of any callable; what it gives is scores.
        scores: Tensor = self.processors(input_ids, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]
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

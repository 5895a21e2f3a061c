"""Helpers to stop a training at a loss that is not finite, with the weights of the last finite loss.

transformers' Trainer continues, and removes such a loss from its log (`logging_nan_inf_filter`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.distributed import is_sharded
from weft.errors import TrainingError, bullet_list

_SHOWN = 60  # characters of each text


class FiniteWeights:
    """A copy of the weights of the last finite loss. If they are sharded, of this process's shards."""

    def __init__(self) -> None:
        self._copies: list[Tensor] | None = None

    @torch.no_grad()
    def keep(self, weights: list[Any]) -> None:
        """Copy the weights. Each call must have the same ones."""
        own = _own_parts(weights)
        if self._copies is None:
            self._copies = [weight.clone() for weight in own]
        torch._foreach_copy_(self._copies, own)

    @torch.no_grad()
    def restore(self, weights: list[Any]) -> None:
        """Copy the kept values back into the weights, if any were kept."""
        if self._copies is not None:
            torch._foreach_copy_(_own_parts(weights), self._copies)


def gradient_norm(weights: list[Any]) -> Tensor:
    """The norm of all gradients, over all shards."""
    norm: Any = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
    return norm.full_tensor() if is_sharded(norm) else norm


def texts_of(input_ids: Any, tokenizer: Any) -> list[str]:
    """The beginnings of a batch's texts, for a message."""
    if input_ids is None:
        return ["(no input_ids)"]
    texts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
    return [repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") for text in texts]


def not_finite_error(what: str, where: str, texts: list[str], learning_rate: float) -> TrainingError:
    """The error for a value that is not finite; all processes raise it.

    Args:
        what: the value that is not finite.
        where: the step, and the forward pass in it.
        texts: the texts of the batch, from all processes with such a value.
        learning_rate: the learning rate of the training.
    """
    error = TrainingError(
        f"training stopped: {what} at {where}, with these texts in the batch:"
        f"{bullet_list(list(dict.fromkeys(texts)))}\nThe model keeps the weights that gave the last finite loss. Look "
        f"at these texts and at the adapters, or lower learning_rate ({learning_rate})"
    )
    error.in_all_processes = True
    return error


def _own_parts(weights: list[Any]) -> list[Tensor]:
    """The weights; if they are sharded, this process's shards."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]

"""The negative log-likelihood of each token of a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Positions that are converted to float32 at a time, to limit memory: a vocabulary has about 10^5 entries.
_POSITIONS = 256


def negative_log_likelihoods(
    logits: Float[Tensor, "batch seq vocab"], token_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch predicted"]:
    """-ln p(token | earlier tokens) for each token except the first, in nats.

    The softmax runs in float32 on the device of the logits. Sums over tokens should be made in float64.

    Args:
        logits: the model's logits of all tokens.
        token_ids: the tokens, with padding; the values at padded positions have no meaning.

    Returns:
        The values in float32; `predicted` is seq - 1.
    """
    batch, seq, _ = logits.shape
    token_ids = token_ids.to(logits.device)
    losses = torch.empty(batch, seq - 1, dtype=torch.float32, device=logits.device)
    for start in range(0, seq - 1, _POSITIONS):
        targets = token_ids[:, start + 1 : start + 1 + _POSITIONS]
        end = start + targets.shape[1]
        scores = logits[:, start:end].float().flatten(0, 1)
        losses[:, start:end] = F.cross_entropy(scores, targets.flatten(), reduction="none").view(targets.shape)
    return losses

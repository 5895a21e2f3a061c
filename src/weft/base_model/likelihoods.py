"""How likely a causal language model finds each token of a text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# Positions whose logits are in float32 at one time: a vocabulary has 10^5 entries.
_POSITIONS = 256


def negative_log_likelihoods(
    logits: Float[Tensor, "batch seq vocab"], token_ids: Int[Tensor, "batch seq"]
) -> Float[Tensor, "batch predicted"]:
    """-ln p(token | the tokens before it) of every token but the first, in nats.

    The softmax, with its sum over the vocabulary, runs in float32 whatever the logits are, on their device, and float32
    is what comes out. Who sums over tokens does that in float64.

    Args:
        logits: of the model, of all tokens.
        token_ids: the tokens, padding included; padded positions mean nothing.
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

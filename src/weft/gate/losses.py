"""Losses of the gate, which are added to the language model's loss, as pure functions.

Shares are the gate's scalings after a softmax: for each token and layer they are positive and sum to one. Each loss is
a mean over layers and tokens, without padding. It is not computed if its weight in `XLoraConfig` is 0.
`passes/gate_losses.py` adds them to the model's loss.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from weft.errors import DataError
from weft.gate.routing import present_positions

# The label of an example or token without an expert, as the ignored index of transformers' `labels`.
NO_EXPERT = -100


def balance_loss(
    shares: Float[Tensor, "batch seq layer expert"],
    padding: Shaped[Tensor, "batch total"] | None = None,
    *,
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """How unevenly the experts are used: 1 if all are used equally, N (the number of experts) if only one is used.

        N Σ_e f_e P_e        mean over layers; P_e: the mean share of expert e over the batch's tokens

    The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6). f_e is the fraction of
    tokens that are sent to expert e, divided by k with top-k; it has no gradient. Without top-k, f_e is P_e, and the
    loss is N Σ_e P_e².

    Args:
        shares: each token's shares, before top-k.
        padding: attention mask, non-zero for tokens; its last `seq` columns are for these tokens. None: no padding.
        top_k: number of experts that each token keeps; None for all.

    Returns:
        The loss, between 1 and N for shares without top-k.

    Example:
        >>> balance_loss(torch.full((1, 5, 2, 4), 1 / 4))
        tensor(1.)
    """
    *_, num_experts = shares.shape
    experts = None if top_k is None or top_k >= num_experts else shares.topk(top_k, dim=-1).indices
    return balance_loss_of_chosen(shares, experts, padding)


def balance_loss_of_chosen(
    shares: Float[Tensor, "batch seq layer expert"],
    experts: Int[Tensor, "batch seq layer top_k"] | None,
    padding: Shaped[Tensor, "batch total"] | None = None,
) -> Float[Tensor, ""]:
    """`balance_loss`, given the indices of each token's chosen experts; None for all experts."""
    *_, num_experts = shares.shape
    weights = token_weights(shares, padding)
    mean = _mean(shares, weights)  # [layer, expert]
    used = mean
    if experts is not None:
        used = _mean(torch.zeros_like(shares).scatter(-1, experts, 1 / experts.shape[-1]), weights)
    return num_experts * (used * mean).sum(-1).mean()


def entropy_loss(
    shares: Float[Tensor, "batch seq layer expert"], padding: Shaped[Tensor, "batch total"] | None = None
) -> Float[Tensor, ""]:
    """The normalised entropy of the shares: 0 if each token has one expert, 1 if all experts have equal shares.

        mean over tokens and layers of  -Σ_e p_e ln p_e / ln N

    A weight above 0 makes the gate sharper (entropy minimisation; Grandvalet and Bengio, NIPS 2004), a weight below 0
    softer (confidence penalty; arXiv 1701.06548).

    Args:
        shares: each token's shares, before top-k.
        padding: attention mask, non-zero for tokens; its last `seq` columns are for these tokens. None: no padding.

    Returns:
        The loss, in [0, 1].

    Example:
        >>> entropy_loss(torch.full((1, 5, 2, 4), 1 / 4))
        tensor(1.)
    """
    return _mean(normalised_entropy(shares), token_weights(shares, padding)).mean()


def expert_label_loss(
    shares: Float[Tensor, "batch seq layer expert"],
    labels: Int[Tensor, "*tokens"],
    padding: Shaped[Tensor, "batch total"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the shares against labels of the data: the expert to which each example or token belongs.

        mean over labelled tokens and layers of  -ln p_label

    DEMix layers (arXiv 2108.05036) also assign experts to known domains. Here the gate learns the assignment, and needs
    no labels after training.

    Args:
        shares: each token's shares, before top-k.
        labels: index of the expert for each example `[batch]` or each token `[batch, seq]`; -100 for none.
        padding: attention mask, non-zero for tokens; its last `seq` columns are for these tokens. None: no padding.

    Returns:
        The loss in nats; 0 if nothing is labelled.

    Raises:
        DataError: the labels are neither one for each example nor one for each token.

    Example:
        >>> expert_label_loss(torch.full((1, 5, 2, 4), 1 / 4), torch.tensor([3]))  # ln 4
        tensor(1.3863)
    """
    batch, seq, layers, _ = shares.shape
    if tuple(labels.shape) not in {(batch,), (batch, seq)}:
        raise DataError(
            f"expert_labels has shape {list(labels.shape)}, expected [{batch}], the number of an expert for each "
            f"example, or [{batch}, {seq}], one for each token"
        )
    labels = labels.to(shares.device)
    labels = labels[:, None].expand(batch, seq) if labels.dim() == 1 else labels
    indices = labels.clamp(min=0)[:, :, None, None].expand(batch, seq, layers, 1)
    losses = -_log(shares.gather(-1, indices)[..., 0])  # [batch, seq, layer]
    return _mean(losses, token_weights(shares, padding) * (labels != NO_EXPERT)).mean()


def normalised_entropy(shares: Float[Tensor, "*tokens expert"]) -> Float[Tensor, "*tokens"]:
    """-Σ_e p_e ln p_e / ln N, in [0, 1]: 0 if one expert has the whole share, 1 for equal shares. 0 if N = 1."""
    return -(shares * _log(shares)).sum(-1) / math.log(max(2, shares.shape[-1]))


def token_weights(
    shares: Float[Tensor, "batch seq layer expert"], padding: Shaped[Tensor, "batch total"] | None
) -> Float[Tensor, "batch seq"]:
    """1 for tokens, 0 for padding."""
    batch, seq, *_ = shares.shape
    if padding is None:
        return shares.new_ones(batch, seq)
    return present_positions(padding, seq).to(shares)


def _mean(values: Float[Tensor, "batch seq *rest"], weights: Float[Tensor, "batch seq"]) -> Float[Tensor, "*rest"]:
    """The mean over tokens; 0 if there are none."""
    # Not a matrix product, which autocast would run in half precision.
    weighted = values * weights.view(*weights.shape, *(1 for _ in values.shape[2:]))
    return weighted.sum(dim=(0, 1)) / weights.sum().clamp(min=1)


def _log(shares: Tensor) -> Tensor:
    # A share can be exactly 0; the gradient of its logarithm would be NaN.
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).log()

"""Losses for the gate beside the language model's, as pure functions over its shares. They know nothing of models.

Shares are the gate's scalings after a softmax: per token and layer they are positive and sum to one. Each loss is a
mean over layers and tokens, padding left out, and costs nothing where its weight in `XLoraConfig` is 0. What puts them
into a model's loss is in `passes/gate_losses.py`.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from weft.errors import DataError
from weft.gate.routing import present_positions

# The label of an example (or a token) that belongs to no expert in particular, as in transformers' `labels`.
NO_EXPERT = -100


def balance_loss(
    shares: Float[Tensor, "batch seq layer expert"],
    padding: Shaped[Tensor, "batch total"] | None = None,
    *,
    top_k: int | None = None,
) -> Float[Tensor, ""]:
    """How unevenly the experts are used: 1 where all are used alike, N where one has everything.

        N Σ_e f_e P_e        mean over layers; P_e: the mean share of expert e over the batch's tokens

    The load-balancing loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6), where f_e is the part of the
    tokens that are sent to expert e. With top-k f_e counts these, divided by k, and has no gradient; where every token
    goes to every expert in shares, the soft count is P_e itself, which makes it N Σ_e P_e².

    Args:
        shares: of the experts in each token, before top-k.
        padding: attention mask, non-zero where there is a token; its last `seq` columns belong to these tokens.
        top_k: how many experts a token keeps; None for all.

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
    """`balance_loss` where each token's experts are chosen already: their numbers; None for all."""
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
    """How undecided the gate is: 0 where each token has one expert, 1 where all experts have equal shares.

        mean over tokens and layers of  -Σ_e p_e ln p_e / ln N

    With a weight above 0 the gate becomes sharper (entropy minimisation; Grandvalet and Bengio, NIPS 2004), below 0
    softer (confidence penalty; arXiv 1701.06548).

    Args:
        shares: of the experts in each token, before top-k.
        padding: attention mask, non-zero where there is a token; its last `seq` columns belong to these tokens.

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
    """Cross entropy of the gate against what the data says: "this example belongs to expert e".

        mean over labelled tokens and layers of  -ln p_label

    As experts are assigned to known domains in DEMix layers (arXiv 2108.05036), but learnt by the gate, which has no
    label to go by later.

    Args:
        shares: of the experts in each token, before top-k.
        labels: number of the expert, for each example or for each token; -100 for none. 0 is the loss where nothing is
            labelled.
        padding: attention mask, non-zero where there is a token; its last `seq` columns belong to these tokens.

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
    """-Σ_e p_e ln p_e / ln N: 0 for one expert alone, 1 for equal shares; 0 where there is only one expert."""
    return -(shares * _log(shares)).sum(-1) / math.log(max(2, shares.shape[-1]))


def token_weights(
    shares: Float[Tensor, "batch seq layer expert"], padding: Shaped[Tensor, "batch total"] | None
) -> Float[Tensor, "batch seq"]:
    """1 where there is a token, 0 where there is padding."""
    batch, seq, *_ = shares.shape
    if padding is None:
        return shares.new_ones(batch, seq)
    return present_positions(padding, seq).to(shares)


def _mean(values: Float[Tensor, "batch seq *rest"], weights: Float[Tensor, "batch seq"]) -> Float[Tensor, "*rest"]:
    """The mean over tokens; 0 where there is none."""
    # No matrix product, which autocast would do in half precision.
    weighted = values * weights.view(*weights.shape, *(1 for _ in values.shape[2:]))
    return weighted.sum(dim=(0, 1)) / weights.sum().clamp(min=1)


def _log(shares: Tensor) -> Tensor:
    # A share can be exactly 0, whose logarithm would give no gradient but nan.
    return shares.clamp(min=torch.finfo(shares.dtype).tiny).log()

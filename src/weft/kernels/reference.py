"""The mixture of experts in torch's own operations, the reference for every other kernel.

    y_t = y0_t + Σ_r  w_{t,r} · (A x_t)_r · B_r          w_{t,r} = λ_{t,e} · s_e · g  for a rank r of expert e

(arXiv 2402.07148, equation 3.) The sum runs over the ranks of all experts. x_t is the input of token t, y0 the output
of the base layer, λ the scaling from the gate, s the LoRA scaling (lora_alpha / r), and g `global_scaling_weight`.
A = [A_1; ...; A_N] is `down` [rank, in]; B = [B_1, ..., B_N], transposed, is `up` [rank, out]. The weights are applied
between the two products, where they cost one multiplication per rank.

`x` and the experts have the same dtype, in which the products are computed. The sum with y0 has the wider of the two
dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def add_mixture(
    result: Float[Tensor, "token out"],
    x: Float[Tensor, "token in"],
    down: Float[Tensor, "rank in"],
    up: Float[Tensor, "rank out"],
    weights: Float[Tensor, "#token rank"],
    left_out: Bool[Tensor, "#token rank"] | None = None,
) -> Float[Tensor, "token out"]:
    """result + ((x Aᵀ) · w) Bᵀ, with all experts for every token.

    Args:
        result: y0.
        x: the layer's input.
        down: A.
        up: B, transposed.
        weights: w, per token, or one row for all tokens.
        left_out: True for ranks with weight 0. Their A x is set to 0, as 0 · inf would be NaN. None: no such rank.

    Returns:
        y, in the wider dtype of `result` and `x`.
    """
    h = F.linear(x, down)  # [token, rank]
    if left_out is not None:
        h = h.masked_fill(left_out, 0)
    h = h * weights
    return torch.addmm(result, h, up) if result.dtype == h.dtype else result + h @ up


def add_chosen(
    result: Float[Tensor, "token out"],
    x: Float[Tensor, "token in"],
    down: Float[Tensor, "rank in"],
    up: Float[Tensor, "rank out"],
    weights: Float[Tensor, "token chosen"],
    ranks: Int[Tensor, " chosen_of_all"],
) -> Float[Tensor, "token out"]:
    """`add_mixture` with only the chosen ranks of each token (top-k), which are gathered. Other ranks have weight 0.

    Args:
        result: y0.
        x: the layer's input.
        down: A.
        up: B, transposed.
        weights: w of the chosen ranks.
        ranks: the indices of the chosen ranks, token by token, `[token * chosen]`.

    Returns:
        y, as in `add_mixture`.
    """
    down, up = down.index_select(0, ranks), up.index_select(0, ranks)
    if len(down) == weights.shape[1]:  # a single token
        return add_mixture(result, x, down, up, weights)
    down, up = down.unflatten(0, weights.shape), up.unflatten(0, weights.shape)  # [token, chosen, in or out]
    h = (torch.bmm(down, x.unsqueeze(2)).squeeze(2) * weights).unsqueeze(1)  # [token, 1, chosen]
    return result + torch.bmm(h, up).squeeze(1)


def scale_ranks(
    h: Tensor,
    scales: Tensor,
    ranks: Sequence[int],
    rank_axis: int,
    *,
    rank_expert: Int[Tensor, " rank"] | None = None,
    chosen_only: bool = False,
) -> Tensor:
    """w · h: the ranks of each expert, multiplied by the expert's scale.

    Args:
        h: A x, `[batch, *cells, rank, ...]`; axes may follow the rank.
        scales: λ · s · g, with an expert axis in the place of `h`'s rank axis.
        ranks: the rank of each expert.
        rank_axis: the index of the rank axis in `h`.
        rank_expert: the expert of each rank; None if all experts have the same rank.
        chosen_only: a scale of 0 gives 0 even where h is infinite (0 · inf would be NaN).

    Returns:
        The scaled h, in the shape of `h`.
    """
    expert_axis = scales.dim() - (h.dim() - rank_axis)
    blocks = h
    if rank_expert is not None:
        scales = scales.index_select(expert_axis, rank_expert)
    else:
        before, after = h.shape[:rank_axis], h.shape[rank_axis + 1 :]
        blocks = h.view(*before, len(ranks), ranks[0], *after)  # [..., expert, rank of one expert, ...]
        scales = scales.unsqueeze(expert_axis + 1)
    if chosen_only:
        blocks = blocks.masked_fill((scales == 0) & ~blocks.isfinite(), 0)
    return (blocks * scales).reshape(h.shape)


def add_product(result: Tensor, h: Float[Tensor, "*cells rank"], up: Float[Tensor, "rank out"]) -> Tensor:
    """result + h @ up, in one fused operation if all dtypes are equal."""
    # Under autocast the fused operation would also round `result`.
    same_dtype = result.dtype == h.dtype == up.dtype and not torch.is_autocast_enabled(h.device.type)
    if same_dtype and result.shape[:-1] == h.shape[:-1]:
        flat = torch.addmm(result.reshape(-1, result.shape[-1]), h.reshape(-1, h.shape[-1]), up)
        return flat.view(result.shape)
    return result + h @ up

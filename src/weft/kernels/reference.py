"""The mixture of experts in torch's own operations: the reference for every other kernel.

    y_t = y0_t + Σ_r  w_{t,r} · (A x_t)_r · B_r          w_{t,r} = λ_{t,e} · s_e · g  for a rank r of expert e

over the ranks of all experts: A = [A_1; ...; A_N] is `down` [rank, in], and B = [B_1, ..., B_N], transposed, is `up`
[rank, out]; y0 is the base layer's output (arXiv 2402.07148, equation 3). A linear map commutes with a number, so the
weights act between the two products, where they cost one multiplication per rank.

All of it runs in the dtype of `x` and the experts, which is one; the sum with y0 in the wider of the two.
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
    """result + ((x Aᵀ) · w) Bᵀ: every token goes to all experts.

    Args:
        result: y0.
        x: the layer's input.
        down: A.
        up: B, transposed.
        weights: w, per token or one row for all.
        left_out: the ranks whose weight is exactly 0, whatever A x is (0 · inf would be NaN); None where there is none.
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
    """`add_mixture` over the ranks that each token has chosen, which are gathered; all others have weight 0.

    Args:
        result: y0.
        x: the layer's input.
        down: A.
        up: B, transposed.
        weights: w of the chosen ranks.
        ranks: which they are, token by token: `[token * chosen]`.
    """
    down, up = down.index_select(0, ranks), up.index_select(0, ranks)
    if len(down) == weights.shape[1]:  # of a single token
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
    """w · h: every expert's block of the rank axis times the expert's scale.

    Args:
        h: A x, `[batch, *cells, rank]`, or with other axes after the rank.
        scales: λ · s · g of the experts, which stand where `h` has its ranks.
        ranks: of each expert.
        rank_axis: of `h`.
        rank_expert: for each rank, the expert it belongs to; None where all experts have equal ranks.
        chosen_only: a scale of 0 leaves its expert out, even where its h has overflowed: 0 · inf would be NaN.
    """
    expert_axis = scales.dim() - (h.dim() - rank_axis)
    blocks = h
    if rank_expert is not None:
        scales = scales.index_select(expert_axis, rank_expert)
    else:
        before, after = h.shape[:rank_axis], h.shape[rank_axis + 1 :]
        blocks = h.view(*before, len(ranks), ranks[0], *after)  # [..., expert, rank of one, ...]
        scales = scales.unsqueeze(expert_axis + 1)
    if chosen_only:
        blocks = blocks.masked_fill((scales == 0) & ~blocks.isfinite(), 0)
    return (blocks * scales).reshape(h.shape)


def add_product(result: Tensor, h: Float[Tensor, "*cells rank"], up: Float[Tensor, "rank out"]) -> Tensor:
    """result + h @ up, fused where the dtypes allow it."""
    # Under autocast a fused product would round the result too.
    same_dtype = result.dtype == h.dtype == up.dtype and not torch.is_autocast_enabled(h.device.type)
    if same_dtype and result.shape[:-1] == h.shape[:-1]:
        flat = torch.addmm(result.reshape(-1, result.shape[-1]), h.reshape(-1, h.shape[-1]), up)
        return flat.view(result.shape)
    return result + h @ up

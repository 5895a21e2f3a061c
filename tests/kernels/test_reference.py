"""The mixture over stacked experts equals the formula written as a loop over tokens and experts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.kernels.reference import add_chosen, add_mixture, add_product, scale_ranks

IN, OUT = 6, 5


def experts(ranks, seed=0):
    """A and B of each expert."""
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rank, IN, generator=random).double(), torch.randn(OUT, rank, generator=random).double())
        for rank in ranks
    ]


def stacked(pairs):
    return torch.cat([down for down, _ in pairs]), torch.cat([up.T for _, up in pairs])


def by_loop(result, x, pairs, weights):
    """result + Σ_e w_{t,e} B_e A_e x_t, token by token and expert by expert; `weights` [token, expert]."""
    found = result.clone()
    for token, row in enumerate(weights.tolist()):
        for (down, up), weight in zip(pairs, row, strict=True):
            if weight != 0:
                found[token] += weight * (up @ (down @ x[token]))
    return found


def inputs(tokens, num_experts, seed=0):
    random = torch.Generator().manual_seed(seed)
    sizes = (tokens, OUT), (tokens, IN), (tokens, num_experts)
    return [torch.randn(*size, generator=random).double() for size in sizes]


def per_rank(weights, ranks):
    return weights.repeat_interleave(torch.tensor(ranks), -1)


RANKS = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(ranks=RANKS, tokens=st.integers(1, 4), seed=st.integers(0, 99), one_row=st.booleans())
def test_all_experts_equal_the_loop(ranks, tokens, seed, one_row):
    pairs = experts(ranks, seed)
    result, x, weights = inputs(tokens, len(ranks), seed)
    weights = weights[:1] if one_row else weights
    expected = by_loop(result, x, pairs, weights.expand(tokens, -1))
    found = add_mixture(result, x, *stacked(pairs), per_rank(weights, ranks))
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(
    num_experts=st.integers(1, 5),
    rank=st.integers(1, 4),
    tokens=st.integers(1, 4),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_chosen_experts_equal_the_loop(num_experts, rank, tokens, seed, data):
    ranks = [rank] * num_experts
    pairs = experts(ranks, seed)
    result, x, weights = inputs(tokens, num_experts, seed)
    top_k = data.draw(st.integers(1, num_experts))
    kept, chosen = weights.topk(top_k, dim=-1)
    expected = by_loop(result, x, pairs, torch.zeros_like(weights).scatter(-1, chosen, kept))
    indices = (chosen[..., None] * rank + torch.arange(rank)).flatten()
    found = add_chosen(result, x, *stacked(pairs), kept.repeat_interleave(rank, -1), indices)
    torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(ranks=RANKS, seed=st.integers(0, 99), of_image=st.booleans())
def test_scaled_ranks_are_the_experts_blocks_times_their_weights(ranks, seed, of_image):
    random = torch.Generator().manual_seed(seed)
    axis = 1 if of_image else 2  # [batch, rank, height, width] or [batch, seq, rank]
    h = torch.randn(*((2, sum(ranks), 3, 2) if of_image else (2, 3, sum(ranks))), generator=random)
    scales = torch.randn(*((2, len(ranks), 1, 1) if of_image else (2, 3, len(ranks))), generator=random)
    blocks = zip(h.split(ranks, axis), scales.split(1, axis), strict=True)
    expected = torch.cat([block * scale for block, scale in blocks], axis)
    equal = len(set(ranks)) == 1
    rank_expert = None if equal else torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
    assert torch.equal(scale_ranks(h, scales, ranks, axis, rank_expert=rank_expert), expected)


def test_an_expert_of_weight_0_is_left_out_even_where_it_overflows():
    pairs = experts([2, 2])
    pairs[1][0].fill_(torch.finfo(torch.float64).max)
    result, x, weights = inputs(3, 2)
    x = x.abs() * 10
    weights[:, 1] = 0
    expected = by_loop(result, x, pairs[:1], weights[:, :1])
    of_ranks = per_rank(weights, [2, 2])
    assert add_mixture(result, x, *stacked(pairs), of_ranks).isnan().any()
    torch.testing.assert_close(add_mixture(result, x, *stacked(pairs), of_ranks, of_ranks == 0), expected)
    down, up = stacked(pairs)
    h = scale_ranks((x @ down.T)[None], weights[None], [2, 2], 2, chosen_only=True)
    torch.testing.assert_close(add_product(result[None], h, up)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_runs_in_the_wider_dtype(dtype):
    down, up = (factor.to(dtype) for factor in stacked(experts([2, 2])))
    result, x, weights = inputs(3, 2)
    weights = per_rank(weights, [2, 2]).to(dtype)
    for kind in (torch.float64, dtype):
        base = result.to(kind)
        assert add_mixture(base, x.to(dtype), down, up, weights).dtype == kind
        assert add_product(base, x.to(dtype) @ down.T, up).dtype == kind

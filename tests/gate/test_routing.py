"""The mathematics of routing, for any shape and any values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.gate.routing import (
    MAX_LEADING_TOKENS,
    align_to_cells,
    keep_each_top_k,
    keep_top_k,
    mean_over_tokens,
    softmax_with_temperature,
)


def for_any(*strategies):
    """Hypothesis' `given`, without a deadline that a busy machine would miss."""
    return lambda test: settings(deadline=None, max_examples=50)(given(*strategies)(test))


# Halves are exact in every dtype, and few enough that ties and zeros are common.
values = st.integers(-8, 8).map(lambda number: number / 2)


@st.composite
def tensors(draw):
    """Scalings `[*batch, expert]` of any shape."""
    shape = [*draw(st.lists(st.integers(1, 3), max_size=3)), draw(st.integers(1, 6))]
    count = torch.Size(shape).numel()
    return torch.tensor(draw(st.lists(values, min_size=count, max_size=count))).view(shape)


@st.composite
def tensors_and_k(draw):
    scalings = draw(tensors())
    return scalings, draw(st.integers(1, scalings.shape[-1]))


def distinct(scalings):
    """The same ranks without ties, and without zeros."""
    ranks = scalings.argsort(dim=-1, stable=True).argsort(dim=-1)
    return ranks.to(scalings.dtype) / 4 - 0.6


# -------------------------------------------------------------- temperature


@pytest.mark.parametrize("temperature", [1e-300, 1e-46, 1e-40, 1e-30, 1e-8])
def test_the_lowest_temperatures_give_the_largest_logit_all_weight_and_equal_ones_equal_parts(temperature):
    logits = torch.tensor([[30.0, 2.0, -30.0], [-1e-5, 1e-5, 1e-5]])
    found = softmax_with_temperature(logits, temperature)
    assert torch.equal(found, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))


# ---------------------------------------------------------------------- top-k


@for_any(tensors_and_k(), st.booleans())
def test_top_k_keeps_exactly_k_and_zeroes_the_others(case, renormalise):
    scalings, k = case
    scalings = distinct(scalings)
    kept = keep_top_k(scalings, k, renormalise=renormalise)
    assert kept.shape == scalings.shape
    assert torch.equal((kept != 0).sum(-1), torch.full(scalings.shape[:-1], k))
    largest = scalings >= scalings.sort(-1, descending=True).values[..., k - 1, None]
    assert torch.equal(kept != 0, largest)
    assert not kept[~largest].signbit().any()  # zero, not minus zero


@for_any(tensors_and_k())
def test_kept_values_are_the_largest_and_unchanged(case):
    scalings, k = case
    kept = keep_top_k(scalings, k)
    expected = scalings.sort(-1, descending=True).values[..., :k]
    found = kept.sort(-1, descending=True).values
    # Zeros stand in for what was dropped: compare as sums, and value by value where there are no negative ones.
    torch.testing.assert_close(kept.sum(-1), expected.sum(-1))
    if (scalings >= 0).all():
        assert torch.equal(found[..., :k], expected)
        assert not found[..., k:].any()
    assert ((kept == scalings) | (kept == 0)).all()


@for_any(tensors_and_k())
def test_renormalised_values_are_a_softmax_over_the_kept_ones(case):
    scalings, k = case
    kept = keep_top_k(scalings, k, renormalise=True)
    torch.testing.assert_close(kept.sum(-1), torch.ones(scalings.shape[:-1]))
    assert torch.equal((kept > 0).sum(-1), torch.full(scalings.shape[:-1], k))
    over_all = torch.softmax(scalings, -1)
    renormalised = torch.where(kept > 0, over_all, 0)
    torch.testing.assert_close(kept, renormalised / renormalised.sum(-1, keepdim=True))


@for_any(tensors(), st.integers(0, 2))
def test_top_k_equal_to_num_experts_is_dense(scalings, more):
    k = scalings.shape[-1] + more
    assert torch.equal(keep_top_k(scalings, k), scalings)
    assert torch.equal(keep_top_k(scalings, None), scalings)
    assert torch.equal(keep_top_k(scalings, k, renormalise=True), torch.softmax(scalings, -1))


@for_any(tensors_and_k())
def test_negative_values_can_be_kept(case):
    scalings, k = case
    scalings = scalings - 10
    assert torch.equal((keep_top_k(scalings, k) < 0).sum(-1), torch.full(scalings.shape[:-1], k))


def test_kept_zero_has_a_share_of_the_renormalised_weight():
    kept = keep_top_k(torch.tensor([0.0, -1.0, -2.0]), 2, renormalise=True)
    torch.testing.assert_close(kept[:2], torch.softmax(torch.tensor([0.0, -1.0]), -1))
    assert kept[2] == 0


@for_any(tensors_and_k(), st.booleans())
def test_each_token_is_routed_by_itself(case, renormalise):
    scalings, k = case
    flat = scalings.view(-1, scalings.shape[-1])
    one_by_one = torch.stack([keep_top_k(row, k, renormalise=renormalise) for row in flat])
    assert torch.equal(keep_top_k(scalings, k, renormalise=renormalise).view_as(flat), one_by_one)


@for_any(tensors_and_k(), st.booleans())
def test_gradient_flows_to_the_kept_ones_only(case, renormalise):
    scalings, k = case
    scalings = distinct(scalings).double().requires_grad_()
    kept = keep_top_k(scalings, k, renormalise=renormalise)
    weight = torch.arange(1.0, kept.numel() + 1, dtype=torch.float64).view_as(kept)
    (gradient,) = torch.autograd.grad((kept * weight).sum(), scalings)
    assert not gradient[kept == 0].any()
    if renormalise:
        # A softmax is unmoved by a shift of all its logits; with one of them alone there is nothing to learn.
        torch.testing.assert_close(gradient.sum(-1), torch.zeros_like(gradient.sum(-1)))
        assert (gradient[kept != 0] != 0).all() or k == 1
    else:
        assert torch.equal(gradient[kept != 0], weight[kept != 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("top_k", [None, 2, 3])
def test_dtype_is_kept(dtype, top_k):
    scalings = torch.tensor([[0.5, 0.0, -1.0]], dtype=dtype)
    assert keep_top_k(scalings, top_k).dtype == dtype
    assert keep_top_k(scalings, top_k, renormalise=True).dtype == dtype


# ---------------------------------------------------------------------- softmax


@for_any(tensors(), st.floats(0.05, 20))
def test_softmax_sums_to_one_and_keeps_the_order(logits, temperature):
    scalings = softmax_with_temperature(logits, temperature)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(logits.shape[:-1]))
    higher = logits[..., :, None] > logits[..., None, :]
    assert (scalings[..., :, None] >= scalings[..., None, :])[higher].all()


@for_any(tensors(), st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits, temperature):
    torch.testing.assert_close(
        softmax_with_temperature(logits, temperature), softmax_with_temperature(logits / temperature, 1.0)
    )
    assert torch.equal(softmax_with_temperature(logits, 1.0), torch.softmax(logits, -1))


@for_any(tensors(), st.floats(0.2, 2), st.floats(1.1, 5))
def test_lower_temperature_is_sharper(logits, temperature, factor):
    sharp = softmax_with_temperature(logits.double(), temperature).amax(-1)
    assert (sharp >= softmax_with_temperature(logits.double(), temperature * factor).amax(-1) - 1e-12).all()


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_softmax_runs_in_float32_or_wider(dtype, wide):
    logits = torch.randn(3, 4).to(dtype)
    scalings = softmax_with_temperature(logits, 0.5)
    assert scalings.dtype == wide
    assert torch.equal(scalings, torch.softmax(logits.to(wide) / 0.5, -1))


# ---------------------------------------------------------------------- mean over tokens


@for_any(st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2))
def test_padding_never_changes_the_mean(tokens, left, right, prefix):
    scalings = torch.rand(2, tokens, 3)
    padded = torch.cat([torch.full((2, left, 3), 1e6), scalings, torch.full((2, right, 3), -1e6)], 1)
    mask = torch.cat([torch.zeros(2, left), torch.ones(2, tokens), torch.zeros(2, right)], 1)
    # A mask may be longer than the sequence: its last columns count.
    mask = torch.cat([torch.ones(2, prefix), mask], 1)
    torch.testing.assert_close(mean_over_tokens(padded, mask), mean_over_tokens(scalings, None))


def test_each_sample_has_its_own_padding():
    scalings = torch.rand(2, 4, 3)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    expected = torch.stack([scalings[0, 2:].mean(0, keepdim=True), scalings[1, :3].mean(0, keepdim=True)])
    torch.testing.assert_close(mean_over_tokens(scalings, mask), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_mask_of_any_dtype_counts_what_is_not_zero(dtype):
    scalings = torch.rand(1, 3, 2)
    mask = torch.tensor([[0, 1, 1]]).to(dtype)
    torch.testing.assert_close(mean_over_tokens(scalings, mask), scalings[:, 1:].mean(1, keepdim=True))


def test_sample_of_padding_alone_is_zero_and_not_nan():
    assert torch.equal(mean_over_tokens(torch.rand(1, 3, 2), torch.zeros(1, 3)), torch.zeros(1, 1, 2))


def test_tokens_of_padding_get_no_gradient():
    scalings = torch.rand(1, 3, 2, requires_grad=True)
    mean_over_tokens(scalings, torch.tensor([[0, 1, 1]])).sum().backward()
    assert torch.equal(scalings.grad[0], torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.5, 0.5]]))


# ---------------------------------------------------------------------- scalings over other axes

cell_axes = st.lists(st.integers(1, 4), max_size=3).map(tuple)


def scalings_of(samples, seq, experts=3):
    return torch.arange(float(samples * seq * experts)).view(samples, seq, experts)


@for_any(st.integers(1, 3), st.booleans(), cell_axes)
def test_one_position_holds_for_all_cells(batch, shared, cells):
    scalings = scalings_of(1 if shared else batch, 1)
    aligned = align_to_cells(scalings, batch, cells)
    everywhere = torch.broadcast_to(aligned, (batch, *cells, 3))
    expected = scalings.view(-1, *(1 for _ in cells), 3).expand(batch, *cells, 3)
    assert torch.equal(everywhere, expected)


@for_any(st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple))
def test_as_many_positions_as_cells_are_one_each(batch, cells):
    positions = torch.Size(cells).numel()
    scalings = scalings_of(batch, positions)
    aligned = align_to_cells(scalings, batch, cells)
    assert torch.equal(torch.broadcast_to(aligned, (batch, *cells, 3)), scalings.view(batch, *cells, 3))


@for_any(st.integers(1, 2), st.integers(2, 5), st.integers(2, 5), st.integers(1, MAX_LEADING_TOKENS + 2))
def test_leading_tokens_of_an_image_are_left_out(batch, height, width, extra):
    cells = height * width
    scalings = scalings_of(batch, extra + cells)
    aligned = align_to_cells(scalings, batch, (height, width))
    if extra <= MAX_LEADING_TOKENS and extra < cells:
        assert torch.equal(aligned, scalings[:, extra:].view(batch, height, width, 3))
    else:
        torch.testing.assert_close(aligned, scalings.mean(1).view(batch, 1, 1, 3))


def test_no_leading_token_is_left_out_of_a_sequence():
    scalings = scalings_of(2, 6)
    torch.testing.assert_close(align_to_cells(scalings, 2, (5,)), scalings.mean(1, keepdim=True))


@for_any(st.integers(1, 3), st.integers(2, 4))
def test_flattened_batch_and_sequence_keep_their_order(samples, seq):
    scalings = scalings_of(samples, seq)
    assert torch.equal(align_to_cells(scalings, samples * seq, ()), scalings.view(samples * seq, 3))


@for_any(st.integers(1, 3), st.integers(2, 4), st.integers(0, 3))
def test_pooled_vector_gets_the_mean_over_unpadded_tokens(batch, seq, left):
    scalings = scalings_of(batch, seq)
    padded = torch.cat([torch.full((batch, left, 3), 1e6), scalings], 1)
    mask = torch.cat([torch.zeros(batch, left), torch.ones(batch, seq)], 1)
    torch.testing.assert_close(align_to_cells(padded, batch, (), mask), scalings.mean(1))


def test_cells_of_another_number_get_the_mean_over_unpadded_tokens():
    scalings, mask = scalings_of(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    aligned = align_to_cells(scalings, 2, (7, 3), mask)
    torch.testing.assert_close(aligned, mean_over_tokens(scalings, mask).view(2, 1, 1, 3))


@for_any(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), cell_axes)
def test_alignment_broadcasts_against_the_activations_or_is_an_error(samples, seq, batch, cells):
    try:
        aligned = align_to_cells(scalings_of(samples, seq), batch, cells)
    except ValueError:
        assert samples not in (1, batch) or not cells
    else:
        assert torch.broadcast_shapes(aligned.shape, (batch, *cells, 3)) == (batch, *cells, 3)


@pytest.mark.parametrize(("batch", "cells", "shape"), [(4, (5,), r"\[4, 5, channels\]"), (5, (), r"\[5, channels\]")])
def test_activations_that_do_not_fit_are_an_error_with_both_shapes(batch, cells, shape):
    with pytest.raises(ValueError, match=rf"2 samples x 3 tokens do not fit activations of shape {shape}"):
        align_to_cells(scalings_of(2, 3), batch, cells)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_number_of_its_own_for_each_token_is_top_k_token_by_token(renormalise):
    scalings = torch.rand(9, 3, 4)
    kept = torch.arange(9).remainder(4).add(1)
    found = keep_each_top_k(scalings, kept[:, None, None], renormalise=renormalise)
    for token, number in enumerate(kept.tolist()):
        expected = keep_top_k(scalings[token], number, renormalise=renormalise)
        assert torch.allclose(found[token], expected, atol=1e-6)
        assert torch.equal(found[token] == 0, expected == 0)


def test_of_equal_scalings_the_first_ones_are_kept():
    found = keep_each_top_k(torch.full((1, 1, 3), 0.5), torch.full((1, 1, 1), 2), renormalise=False)
    assert found.tolist() == [[[0.5, 0.5, 0.0]]]

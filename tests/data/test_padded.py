"""Sequences become rectangular batches."""

import torch

from weft.data.padded import padded, padded_batches


def test_sequences_are_padded_on_the_right_to_the_longest():
    ids, mask = padded([[5, 6, 7], torch.tensor([8])])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.long


def test_batches_hold_all_sequences_in_their_order_each_as_wide_as_its_longest():
    sequences = [[1], [2, 3], [4], [5, 6, 7], [8]]
    batches = list(padded_batches(sequences, 2))
    assert [tuple(ids.shape) for ids, _ in batches] == [(2, 2), (2, 3), (1, 1)]
    found = [row[kept.bool()].tolist() for ids, mask in batches for row, kept in zip(ids, mask, strict=True)]
    assert found == sequences

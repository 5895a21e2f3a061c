"""Perplexity is the token-weighted one, whatever the batching and padding."""

import math

import pytest
import torch

from models import VOCAB, tiny_llama
from weft.data.padded import padded_batches
from weft.evaluate import perplexity


@pytest.fixture
def sequences():
    return [torch.randint(1, VOCAB, (length,)).tolist() for length in (3, 9, 2, 6)]


def test_perplexity_is_the_same_for_every_batch_size(sequences):
    model = tiny_llama()
    total, count = 0.0, 0
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.tensor([sequence])
            total += float(model(input_ids=ids, labels=ids).loss) * (len(sequence) - 1)
            count += len(sequence) - 1
    for batch_size in (1, 2, 4):
        assert perplexity(model, sequences, batch_size) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_batches_are_padded_on_the_right(sequences):
    (ids, mask), *_ = padded_batches(sequences, 2)
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 0], [1] * 9]
    assert ids[0, :3].tolist() == sequences[0]

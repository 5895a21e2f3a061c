"""How likely a model finds each token."""

import pytest
import torch

from weft.base_model.likelihoods import _POSITIONS, negative_log_likelihoods


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("seq", [1, 2, 5, _POSITIONS + 1, 2 * _POSITIONS + 3])
def test_it_is_the_softmax_of_the_position_before(seq, dtype):
    logits, token_ids = torch.randn(2, seq, 7).to(dtype), torch.randint(0, 7, (2, seq))
    found = negative_log_likelihoods(logits, token_ids)
    probabilities = logits[:, :-1].float().softmax(-1).gather(-1, token_ids[:, 1:, None])[..., 0]
    assert found.shape == (2, seq - 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -probabilities.log())

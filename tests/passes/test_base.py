"""One call of the base model."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import weft
from models import VOCAB, quietly, tiny_llama


class CountedTopK(TorchDispatchMode):
    """Counts how often torch looks for the largest values."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten.topk.default
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def decode(model):
    model(input_ids=torch.ones(1, 1).long())


@torch.no_grad()
def read_and_freeze(model):
    with model.base_model.passes.freeze_scalings_at(8):
        model(input_ids=torch.ones(1, 4).long(), use_cache=True)


def train(model):
    model.train()
    model.gate_metrics.enabled = True
    ids = torch.randint(1, VOCAB, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("call", [decode, read_and_freeze, train])
@pytest.mark.parametrize("options", [{}, {"gate_layer": 1}, {"layerwise_scalings": False}], ids=str)
def test_top_k_is_computed_once_a_call(llama_adapters, call, options):
    if call is read_and_freeze and "gate_layer" in options:
        pytest.skip("there is nothing to freeze with one pass")
    options = {"top_k_lora": 1, "balance_loss_weight": 0.1, "layerwise_scalings": True, **options}
    model = quietly(weft.from_adapters, tiny_llama(), llama_adapters, **options).eval()
    with CountedTopK() as counted:
        call(model)
    assert counted.number == 1

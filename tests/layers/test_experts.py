"""The stack is the adapters' storage, not a copy of it, and follows whatever happens to them."""

import copy
import gc

import peft
import pytest
import torch
from torch import nn

from models import lora, quietly, randomise
from weft.errors import AdapterError
from weft.layers.conv2d import XLoraConv2dLayer
from weft.layers.embedding import XLoraEmbeddingLayer
from weft.layers.experts import StackedExperts
from weft.layers.linear import XLoraLinearLayer


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.emb = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 4, 3)


LAYERS = {"lin": XLoraLinearLayer, "emb": XLoraEmbeddingLayer, "conv": XLoraConv2dLayer}


def experts_of(kind, ranks=(2, 3), **options):
    """(peft's layer, its stacked experts) with one adapter per rank, all active."""
    model = Tiny()
    names = [f"e{i}" for i in range(len(ranks))]
    options = {"task_type": None, "target_modules": [kind], **options}
    lora_model = quietly(peft.LoraModel, model, lora(r=ranks[0], **options), names[0])
    for name, rank in zip(names[1:], ranks[1:], strict=True):
        lora_model.peft_config[name] = lora(r=rank, **options)
        quietly(lora_model.inject_adapter, model, name)
    randomise(model, 0)
    lora_model.set_adapter(names)
    target = getattr(model, kind)
    return target, StackedExperts(target, LAYERS[kind].layout)


def expected_factors(target, layout):
    names = target.active_adapters
    return [
        torch.cat([storage.to_rows(storage.find(target, name)) for name in names])
        for storage in (layout.down, layout.up)
    ]


def assert_in_step(target, experts):
    (stack,) = experts.stacks()
    down, up = expected_factors(target, experts.layout)
    assert torch.equal(stack.down, down)
    assert torch.equal(stack.up, up)


def storages(target):
    return {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for name, parameter in target.named_parameters()
        if "lora_" in name
    }


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3, 1), (4,)])
def test_stack_holds_every_adapter_without_doubling_their_memory(kind, ranks):
    target, experts = experts_of(kind, ranks)
    before = sum(storages(target).values())
    assert_in_step(target, experts)
    gc.collect()
    assert sum(storages(target).values()) == before
    (stack,) = experts.stacks()
    assert {stack.down.untyped_storage().data_ptr(), stack.up.untyped_storage().data_ptr()} == set(storages(target))


@pytest.mark.parametrize("kind", LAYERS)
def test_stacking_leaves_the_adapters_values_and_state_dict_as_they_were(kind):
    target, experts = experts_of(kind)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    experts.stacks()
    assert before.keys() == target.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda target: target.to(torch.float64),
        lambda target: target.to(torch.bfloat16).float(),
        lambda target: randomise(target, 5),
        lambda target: target.load_state_dict({key: value + 1 for key, value in target.state_dict().items()}),
        lambda target: target.load_state_dict(
            {key: value + 1 for key, value in target.state_dict().items()}, assign=True
        ),
        lambda target: target.set_adapter(["e1", "e0"]),
        lambda target: target.set_adapter(["e1"]),
        lambda target: target.delete_adapter("e0"),
    ],
    ids=["double", "cast and back", "in place", "load", "load assign", "reorder", "subset", "delete"],
)
def test_stack_follows(kind, change):
    target, experts = experts_of(kind)
    experts.stacks()
    change(target)
    assert_in_step(target, experts)
    assert experts.stacks()[0].names == tuple(target.active_adapters)


def test_stack_is_made_once_while_nothing_changes():
    _, experts = experts_of("lin")
    assert experts.stacks() is experts.stacks()


def test_inactive_adapters_do_not_keep_an_earlier_stack_alive():
    target, experts = experts_of("lin", ranks=(2, 3, 4))
    total = sum(parameter.numel() * 4 for name, parameter in target.named_parameters() if "lora_" in name)
    for active in (["e0", "e1", "e2"], ["e2"], ["e1", "e0"]):
        target.set_adapter(active)
        experts.stacks()
        assert sum(storages(target).values()) == total


def test_deep_copy_has_a_stack_of_its_own():
    target, experts = experts_of("lin")
    experts.stacks()
    twin = copy.deepcopy(experts)
    assert twin.target is not target
    randomise(twin.target, 9)
    assert_in_step(twin.target, twin)
    assert_in_step(target, experts)
    assert not torch.equal(twin.stacks()[0].down, experts.stacks()[0].down)


def test_experts_of_different_dtypes_get_a_stack_each():
    target, experts = experts_of("lin", ranks=(2, 3, 2))
    target.lora_A["e1"].to(torch.float64)
    target.lora_B["e1"].to(torch.float64)
    stacks = experts.stacks()
    assert [(stack.names, stack.columns, stack.down.dtype) for stack in stacks] == [
        (("e0", "e2"), (0, 2), torch.float32),
        (("e1",), (1,), torch.float64),
    ]


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_reach_the_adapters_own_parameters(kind):
    target, experts = experts_of(kind, ranks=(2, 3))
    (stack,) = experts.stacks()
    down, up = experts.differentiable(stack)
    (down.sin().sum() + up.cos().sum()).backward()
    for name in ("e0", "e1"):
        layout = experts.layout
        down_parameter, up_parameter = layout.down.find(target, name), layout.up.find(target, name)
        torch.testing.assert_close(down_parameter.grad, down_parameter.detach().cos())
        torch.testing.assert_close(up_parameter.grad, -up_parameter.detach().sin())


def test_frozen_experts_give_plain_tensors():
    target, experts = experts_of("lin")
    target.requires_grad_(False)
    (stack,) = experts.stacks()
    assert not any(factor.requires_grad for factor in experts.differentiable(stack))


def test_an_optimizer_step_changes_the_stack():
    target, experts = experts_of("lin")
    (stack,) = experts.stacks()
    optimizer = torch.optim.AdamW(target.parameters(), lr=0.1)
    down, up = experts.differentiable(stack)
    (down.square().sum() + up.square().sum()).backward()
    optimizer.step()
    assert experts.stacks()[0] is stack  # changed in place, not made anew
    assert_in_step(target, experts)


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_is_refused_by_the_adapters_name(kind):
    _, experts = experts_of(kind, use_dora=True)
    with pytest.raises(AdapterError, match="adapter 'e0' uses DoRA"):
        experts.stacks()
    assert isinstance(AdapterError("x"), ValueError)

"""Convolutions: what scalings over tokens mean for an image, alone and in real vision models."""

from types import SimpleNamespace

import peft
import pytest
import torch
from torch import nn

import weft
from models import lora, quietly, randomise, save_adapter
from unusual_models import VISION
from weft import XLoraConfig
from weft.layers import XLoraConv2dLayer

BATCH, SIZE = 2, 7


def conv_layer(ranks=(2, 4), groups=1, *, lora_bias=False, **options):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=groups, **options)})
    lora_model = None
    for i, rank in enumerate(ranks):
        config = lora(r=rank, target_modules=["conv"], task_type=None, lora_bias=lora_bias)
        if lora_model is None:
            lora_model = quietly(peft.LoraModel, model, config, "e0")
        else:
            lora_model.peft_config[f"e{i}"] = config
            quietly(lora_model.inject_adapter, model, f"e{i}")
    randomise(model, 0)
    lora_model.set_adapter([f"e{i}" for i in range(len(ranks))])
    target = model["conv"].eval()
    config = XLoraConfig(hidden_size=4, adapters=dict.fromkeys(target.active_adapters, "."))
    return target, XLoraConv2dLayer(SimpleNamespace(), target, target.forward, 0, config)


def by_loop(target, x, weights):
    """weights: [batch, expert, height or 1, width or 1]; applied where the definition puts them, between A and B."""
    result = target.base_layer(x)
    for column, name in enumerate(target.active_adapters):
        inner = target.lora_A[name](x) * weights[:, column, None]
        result = result + target.lora_B[name](inner) * target.scaling[name]
    return result


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(
    ("ranks", "options"), [((2, 4), {}), ((4, 4), {"stride": 2, "padding": 1}), ((2, 4, 6), {"groups": 2})]
)
def test_one_position_scales_the_sample(ranks, options, lora_bias):
    target, layer = conv_layer(ranks, lora_bias=lora_bias, **options)
    x, scalings = torch.randn(BATCH, 4, SIZE, SIZE), torch.rand(BATCH, 1, 1, len(ranks))
    expected = by_loop(target, x, scalings[:, 0, 0, :, None, None])
    torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)
    # A scaled sample is a scaled input, as the formula for linear layers has it.
    if not lora_bias:
        one = sum(
            target.lora_B[name](target.lora_A[name](x * scalings[:, 0, 0, i, None, None, None])) * target.scaling[name]
            for i, name in enumerate(target.active_adapters)
        )
        torch.testing.assert_close(
            layer.forward(x, scalings=scalings), target.base_layer(x) + one, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("leading", [0, 1, 5])
def test_one_position_per_output_cell_scales_that_cell(leading):
    target, layer = conv_layer()
    x = torch.randn(BATCH, 4, SIZE, SIZE)
    cells = SIZE - 2
    scalings = torch.rand(BATCH, leading + cells * cells, 1, 2)
    per_cell = scalings[:, leading:, 0].reshape(BATCH, cells, cells, 2).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer.forward(x, scalings=scalings), by_loop(target, x, per_cell), rtol=1e-5, atol=1e-5)


def test_any_other_length_counts_as_its_mean():
    target, layer = conv_layer()
    x, scalings = torch.randn(BATCH, 4, SIZE, SIZE), torch.rand(BATCH, 11, 1, 2)
    mean = scalings[:, :, 0].mean(1)[:, :, None, None]
    torch.testing.assert_close(layer.forward(x, scalings=scalings), by_loop(target, x, mean), rtol=1e-5, atol=1e-5)


def test_without_scalings_every_expert_has_weight_one():
    target, layer = conv_layer((2, 3, 1))
    x = torch.randn(BATCH, 4, SIZE, SIZE)
    expected = target.base_layer(x) + sum(
        target.lora_B[name](target.lora_A[name](x)) * target.scaling[name] for name in target.active_adapters
    )
    torch.testing.assert_close(layer.forward(x), expected, rtol=1e-5, atol=1e-5)


def test_active_dropout_equals_the_loop_with_the_same_masks():
    target, layer = conv_layer()
    target.lora_dropout["e0"] = nn.Dropout(0.5)
    target.train()
    x, scalings = torch.randn(BATCH, 4, SIZE, SIZE), torch.rand(BATCH, 1, 1, 2)
    torch.manual_seed(1)
    expected = target.base_layer(x) + sum(
        target.lora_B[name](target.lora_A[name](target.lora_dropout[name](x * scalings[:, 0, 0, i, None, None, None])))
        * target.scaling[name]
        for i, name in enumerate(target.active_adapters)
    )
    torch.manual_seed(1)
    torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_a_vision_model_with_convolutional_experts_works_end_to_end(name, tmp_path):
    make, targets, size, positions = VISION[name]
    paths = {
        f"e{i}": save_adapter(make(), lora(task_type=None, target_modules=targets), tmp_path / f"e{i}", seed=i)
        for i in range(2)
    }
    model = weft.from_adapters(make(), paths, layerwise_scalings=True)
    kinds = {
        type(module.forward.__self__) for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert XLoraConv2dLayer in kinds
    images = torch.randn(BATCH, 3, size, size)
    logits = model(pixel_values=images).logits
    assert model.get_latest_scalings().shape[1] == positions
    # One expert with all the weight is that adapter alone.
    for expert, path in paths.items():
        alone = quietly(peft.PeftModel.from_pretrained, make(), path)
        with model.fixed_scalings({expert: 1.0}):
            torch.testing.assert_close(model(pixel_values=images).logits, alone(pixel_values=images).logits)
    # Training the gate reduces a loss.
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    labels = torch.tensor([0, 1])
    first = nn.functional.cross_entropy(logits, labels)
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
    assert loss < first


@pytest.mark.parametrize("name", VISION)
def test_a_vision_model_with_a_trained_head_and_dora_comes_back_as_saved(name, tmp_path):
    make, targets, size, _ = VISION[name]
    paths = {
        f"e{i}": save_adapter(
            make(), lora(task_type=None, target_modules=targets, use_dora=bool(i)), tmp_path / f"e{i}", seed=i
        )
        for i in range(2)
    }
    model = weft.from_adapters(make(), paths, layerwise_scalings=True, allow_dora=True, heads=["classifier"])
    images, labels = torch.randn(BATCH, 3, size, size), torch.tensor([0, 1])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", make())
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values=images).logits, model(pixel_values=images).logits)

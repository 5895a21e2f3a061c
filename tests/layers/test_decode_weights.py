"""Weights made ready for few tokens are those that the layers compute themselves."""

import copy

import pytest
import torch

import weft
from models import VOCAB, is_expert, lora, quietly, save_adapter, tiny_llama
from weft.layers import XLoraLinearLayer
from weft.layers.decode_weights import FEW_TOKENS, SHARE_LOOKED_AT


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 5))


def mixture(adapters, **options):
    torch.manual_seed(1)
    return quietly(weft.from_adapters, tiny_llama(), adapters, **{"layerwise_scalings": True, **options}).eval()


@torch.no_grad()
def with_and_without(model, ids, monkeypatch):
    """Logits, and those with every layer on its own; how many layers took what was ready."""
    taken = []
    plain = XLoraLinearLayer.add_ready

    def counted(self, *args):
        result = plain(self, *args)
        taken.append(result is not None)
        return result

    monkeypatch.setattr(XLoraLinearLayer, "add_ready", counted)
    found = model(input_ids=ids).logits
    monkeypatch.setattr(XLoraLinearLayer, "add_ready", lambda *args: None)
    expected = model(input_ids=ids).logits
    monkeypatch.setattr(XLoraLinearLayer, "add_ready", plain)
    return found, expected, sum(taken)


@pytest.mark.parametrize(
    "options",
    [
        {},  # of different ranks, scalings and targets
        {"layerwise_scalings": False},
        {"top_k_lora": 2, "global_scaling_weight": 0.6},
        {"gate_layer": 1},
        {"gate_layer": 1, "layerwise_scalings": False},
        {"scaling_pass_value": 0.3},
    ],
    ids=str,
)
def test_few_tokens_give_the_same_logits(llama_adapters, ids, options, monkeypatch):
    found, expected, taken = with_and_without(mixture(llama_adapters, **options), ids, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert taken == (16 if "scaling_pass_value" in options else 8)  # four adapted layers in each of two


def test_fixed_scalings_layer_by_layer_too(llama_adapters, ids, monkeypatch):
    model = mixture(llama_adapters, gate_layer=1)
    with model.fixed_scalings(torch.rand(8, 3)):
        found, expected, taken = with_and_without(model, ids, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert taken == 8


def test_double_precision_loses_nothing(llama_adapters, ids, monkeypatch):
    found, expected, _ = with_and_without(mixture(llama_adapters).double(), ids, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_experts_of_two_dtypes_and_other_kinds_of_layers_are_left_to_the_layers(tmp_path, ids, monkeypatch):
    config = lora(target_modules=["embed_tokens", "q_proj"])
    paths = {name: save_adapter(tiny_llama(), config, tmp_path / name, seed=seed) for seed, name in enumerate("ab")}
    model = mixture(paths)
    for name, parameter in model.named_parameters():
        if is_expert(name) and ".layers.0." in name and ".a." in name:
            parameter.data = parameter.data.bfloat16()
    found, expected, taken = with_and_without(model, ids, monkeypatch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert taken == 1  # q_proj of the second decoder layer


def test_many_tokens_gradients_and_autocast_are_left_to_the_layers(llama_adapters):
    model = mixture(llama_adapters)
    few = torch.ones(1, FEW_TOKENS).long()
    with torch.no_grad():
        model(input_ids=few)
        assert model.passes._followed.ready is not None
        model(input_ids=torch.cat([few, few[:, :1]], 1))
        assert model.passes._followed.ready is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(input_ids=few)
        assert model.passes._followed.ready is None
    model(input_ids=few)
    assert model.passes._followed.ready is None


@torch.no_grad()
def test_an_expert_with_new_storage_is_followed_at_once(llama_adapters, ids):
    model = mixture(llama_adapters)
    model(input_ids=ids)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    layer.lora_A["math"].weight.data = layer.lora_A["math"].weight.data * 3
    layer.lora_B["code"].weight = torch.nn.Parameter(layer.lora_B["code"].weight * 2)
    layer.scaling["math"] = 0.7
    found = [model(input_ids=ids).logits for _ in range(2)]
    twin = mixture(llama_adapters)
    other = twin.get_base_model().model.layers[1].self_attn.q_proj
    other.lora_A["math"].weight.mul_(3)
    other.lora_B["code"].weight.mul_(2)
    other.scaling["math"] = 0.7
    for logits in found:
        torch.testing.assert_close(logits, twin(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_copy_has_experts_of_its_own(llama_adapters, ids):
    model = mixture(llama_adapters)
    expected = model(input_ids=ids).logits
    twin = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if is_expert(name):
            parameter.zero_()
    torch.testing.assert_close(twin(input_ids=ids).logits, expected)
    assert not torch.allclose(model(input_ids=ids).logits, expected)


def q_projections(model):
    return [module for name, module in model.named_modules() if name.endswith("q_proj") and hasattr(module, "lora_A")]


@torch.no_grad()
def give_new_storage(target):
    for module in target.lora_A.values():
        module.weight.data = module.weight + 1


@torch.no_grad()
def test_an_expert_that_gets_new_storage_in_the_midst_of_a_text_is_noticed_within_eight_tokens(llama_adapters, ids):
    model = mixture(llama_adapters)
    cache = model(input_ids=ids[:, :1], use_cache=True).past_key_values
    model(input_ids=ids[:, 1:2], past_key_values=cache)
    target = q_projections(model)[1]
    give_new_storage(target)

    def in_step():
        (stack,) = target.forward.__self__.experts.current
        return stack.down.data_ptr() == next(iter(target.lora_A.values())).weight.data_ptr()

    assert not in_step()
    for _ in range(SHARE_LOOKED_AT):
        model(input_ids=ids[:, 2:3], past_key_values=cache)
    assert in_step()


@torch.no_grad()
@pytest.mark.parametrize("new_text", [False, True])
def test_what_changes_all_layers_or_comes_before_a_new_text_is_noticed_at_once(llama_adapters, ids, new_text):
    model = mixture(llama_adapters)
    cache = model(input_ids=ids[:, :2], use_cache=True).past_key_values
    model(input_ids=ids[:, 2:3], past_key_values=cache)
    again = copy.deepcopy(cache)
    for target in q_projections(model)[1:] if new_text else q_projections(model):
        give_new_storage(target)
    found = model(input_ids=ids[:, 3:4], past_key_values=again if new_text else cache).logits
    fresh = copy.deepcopy(model)  # stacks everything again
    expected = fresh(input_ids=ids[:, 3:4], past_key_values=cache if new_text else again).logits
    torch.testing.assert_close(found, expected)

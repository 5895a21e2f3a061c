"""Every layer equals the formula written as a loop over its experts (models.mixture_by_loop)."""

from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import weft
from models import VOCAB, lora, mixture_by_loop, quietly, randomise, save_adapter, tiny_llama
from weft import XLoraConfig
from weft.errors import AdapterError
from weft.gate.routing import keep_top_k
from weft.layers import XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer

BATCH, SEQ, LAYERS = 2, 5, 3


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)
        self.other = nn.Linear(6, 5)
        self.emb = nn.Embedding(11, 6)
        self.conv1d = transformers.pytorch_utils.Conv1D(5, 6)


def layer_with(configs, kind="lin", *, layer_number=1, **options):
    """An X-LoRA layer around peft's, one adapter per config; a config that targets another module is missing here."""
    model = Tiny()
    lora_model = None
    for name, config in configs.items():
        config.task_type = None
        if lora_model is None:
            lora_model = quietly(peft.LoraModel, model, config, name)
        else:
            lora_model.peft_config[name] = config
            quietly(lora_model.inject_adapter, model, name)
    randomise(model, 0)
    lora_model.set_adapter(list(configs))
    model.eval()
    target = getattr(model, kind)
    config = XLoraConfig(hidden_size=6, adapters=dict.fromkeys(configs, "."), **options)
    layer_class = XLoraEmbeddingLayer if kind == "emb" else XLoraLinearLayer
    return target, layer_class(SimpleNamespace(disabled=False), target, target.forward, layer_number, config)


def adapters(*ranks, kind="lin", **options):
    return {f"e{i}": lora(r=rank, target_modules=[kind], **options) for i, rank in enumerate(ranks)}


def an_input(kind):
    return torch.randint(0, 11, (BATCH, SEQ)) if kind == "emb" else torch.randn(BATCH, SEQ, 6)


def some_scalings(num_experts):
    return torch.rand(BATCH, SEQ, LAYERS, num_experts)


def assert_equal_to_loop(target, layer, x, scalings, **options):
    weights = None
    if scalings is not None:
        weights = keep_top_k(
            scalings[:, :, layer.layer_number], layer.config.top_k_lora, renormalise=layer.config.enable_softmax_topk
        )
    expected = mixture_by_loop(target, x, weights, **options)
    found = layer.forward(x, scalings=scalings)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lin", "emb", "conv1d"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scalings", "no scalings"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2), (3,)])
def test_mixture_equals_the_loop(kind, scaled, ranks):
    target, layer = layer_with(adapters(*ranks, kind=kind, fan_in_fan_out=kind == "conv1d"), kind)
    assert_equal_to_loop(target, layer, an_input(kind), some_scalings(len(ranks)) if scaled else None)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    missing=st.sets(st.integers(0, 4), max_size=3),
    alphas=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    rslora=st.booleans(),
    kind=st.sampled_from(["lin", "emb"]),
    top_k=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_mixture_equals_the_loop_for_any_ranks_alphas_and_missing_adapters(
    ranks, missing, alphas, rslora, kind, top_k, seed
):
    configs = {
        f"e{i}": lora(
            r=rank, lora_alpha=alphas[i], use_rslora=rslora, target_modules=["other"] if i in missing else [kind]
        )
        for i, rank in enumerate(ranks)
    }
    if all(i in missing for i in range(len(ranks))):
        configs["e0"].target_modules = {kind}
    torch.manual_seed(seed)
    target, layer = layer_with(configs, kind, top_k_lora=min(top_k, len(ranks)))
    assert_equal_to_loop(target, layer, an_input(kind), some_scalings(len(ranks)))


def test_column_of_an_expert_is_its_place_among_the_active_adapters():
    configs = {
        "a": lora(target_modules=["lin"]),
        "b": lora(target_modules=["other"]),
        "c": lora(target_modules=["lin"]),
    }
    target, layer = layer_with(configs)
    x, scalings = an_input("lin"), torch.zeros(BATCH, SEQ, LAYERS, 3)
    scalings[..., 1] = 1  # b, which this layer does not have
    assert torch.equal(layer.forward(x, scalings=scalings), target.base_layer(x))
    target.set_adapter(["c", "a"])
    assert_equal_to_loop(target, layer, x, some_scalings(2))


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_global_weight_acts_only_with_scalings(weight):
    target, layer = layer_with(adapters(2, 3), global_scaling_weight=weight)
    x = an_input("lin")
    assert_equal_to_loop(target, layer, x, some_scalings(2), global_weight=weight)
    torch.testing.assert_close(layer.forward(x), mixture_by_loop(target, x, None))


def test_rank_and_alpha_patterns_count():
    target, layer = layer_with(
        adapters(4, 4, rank_pattern={"lin": 2}, alpha_pattern={"lin": 5}) | {"p": lora(r=4, target_modules=["lin"])}
    )
    assert target.r == {"e0": 2, "e1": 2, "p": 4}
    assert_equal_to_loop(target, layer, an_input("lin"), some_scalings(3))


def test_a_scale_that_is_changed_later_counts():
    target, layer = layer_with(adapters(2, 3))
    x, scalings = an_input("lin"), some_scalings(2)
    layer.forward(x, scalings=scalings)
    target.set_scale("e0", 0.25)
    target.scale_layer(3)
    assert_equal_to_loop(target, layer, x, scalings)


def test_lora_bias_is_not_scaled_by_the_scalings():
    target, layer = layer_with(adapters(2, 3, lora_bias=True) | adapters_without_bias(), global_scaling_weight=0.5)
    x = an_input("lin")
    assert_equal_to_loop(target, layer, x, some_scalings(3), global_weight=0.5)
    assert_equal_to_loop(target, layer, x, None)
    bias = sum(target.lora_B[name].bias * target.scaling[name] * 0.5 for name in ("e0", "e1"))
    torch.testing.assert_close(
        layer.forward(x, scalings=torch.zeros(BATCH, SEQ, LAYERS, 3)), target.base_layer(x) + bias
    )


def adapters_without_bias():
    return {"plain": lora(r=2, target_modules=["lin"])}


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_equals_the_loop(top_k, renormalise):
    target, layer = layer_with(
        adapters(2, 2, 2), top_k_lora=top_k, enable_softmax_topk=renormalise, enable_softmax=not renormalise
    )
    assert_equal_to_loop(target, layer, an_input("lin"), some_scalings(3))
    assert (layer.get_maybe_topk_scalings(some_scalings(3)) != 0).sum(-1).eq(top_k).all()


def test_apply_scalings_to_x_takes_one_experts_column():
    x, scalings = torch.randn(BATCH, SEQ, 6), torch.rand(BATCH, SEQ, 3)
    assert torch.equal(XLoraLayer.apply_scalings_to_x(x, scalings, 2), x * scalings[:, :, 2, None])


@pytest.mark.parametrize(
    ("base", "experts", "inputs"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
    ],
)
def test_result_has_the_inputs_dtype(base, experts, inputs):
    target, layer = layer_with(adapters(2, 3))
    target.base_layer.to(base)
    target.lora_A.to(experts)
    target.lora_B.to(experts)
    x, scalings = torch.randn(BATCH, SEQ, 6, dtype=inputs), some_scalings(2)
    found = layer.forward(x, scalings=scalings)
    assert found.dtype == inputs
    reference = mixture_by_loop(target, x, scalings[:, :, 1])
    torch.testing.assert_close(found, reference, rtol=2e-2, atol=5e-2)


def test_experts_of_different_dtypes_mix():
    target, layer = layer_with(adapters(2, 3, 2))
    for factor in (target.lora_A, target.lora_B):
        factor["e1"].to(torch.float64)
    x, scalings = an_input("lin"), some_scalings(3)
    torch.testing.assert_close(
        layer.forward(x, scalings=scalings), mixture_by_loop(target, x, scalings[:, :, 1]), rtol=1e-5, atol=1e-5
    )


def test_active_dropout_has_its_own_mask_per_expert():
    target, layer = layer_with(adapters(2, 3, lora_dropout=0.5) | adapters_without_bias())
    x, scalings = an_input("lin"), some_scalings(3)
    target.train()
    for seed in range(5):
        torch.manual_seed(seed)
        expected = mixture_by_loop(target, x, scalings[:, :, 1])
        torch.manual_seed(seed)
        torch.testing.assert_close(layer.forward(x, scalings=scalings), expected, rtol=1e-5, atol=1e-5)
    target.eval()
    assert_equal_to_loop(target, layer, x, scalings)


def test_merged_layer_adds_nothing():
    target, layer = layer_with(adapters(2, 3))
    target.merge()
    x = an_input("lin")
    assert torch.equal(layer.forward(x, scalings=some_scalings(2)), target.base_layer(x))


def test_disabled_layer_is_the_base_layer_also_when_it_was_merged():
    target, layer = layer_with(adapters(2, 3))
    x = an_input("lin")
    before = target.base_layer(x)
    target.merge()
    target._disable_adapters = True
    torch.testing.assert_close(layer.forward(x, scalings=some_scalings(2)), before)


@pytest.mark.parametrize("kind", ["lin", "emb"])
def test_dora_is_an_error_that_names_the_adapter(kind):
    _, layer = layer_with(adapters(2, kind=kind) | {"dora": lora(target_modules=[kind], use_dora=True)}, kind)
    with pytest.raises(ValueError, match="adapter 'dora' uses DoRA"):
        layer.forward(an_input(kind), scalings=some_scalings(2))


def test_other_variants_of_lora_are_an_error_that_names_them():
    target, layer = layer_with({"a": lora(target_modules=["lin"])})
    target.lora_variant["a"] = SimpleNamespace()
    with pytest.raises(AdapterError, match="adapter 'a' uses the LoRA variant SimpleNamespace"):
        layer.forward(an_input("lin"))


@pytest.mark.parametrize("flat", [True, False])
def test_flattened_tokens_and_pooled_samples_find_their_scalings(flat):
    target, layer = layer_with(adapters(2, 3))
    x, scalings = an_input("lin"), some_scalings(2)
    if flat:
        expected = mixture_by_loop(target, x, scalings[:, :, 1]).flatten(0, 1)
        found = layer.forward(x.flatten(0, 1), scalings=scalings)
    else:
        mean = scalings[:, :, 1].mean(1, keepdim=True)
        expected = mixture_by_loop(target, x[:, :1], mean)[:, 0]
        found = layer.forward(x[:, 0], scalings=scalings)
    torch.testing.assert_close(found, expected)


def test_scalings_of_another_batch_are_an_error():
    _, layer = layer_with(adapters(2, 3))
    with pytest.raises(ValueError, match=r"scalings of 2 samples x 5 tokens do not fit activations of shape \[3, 5, "):
        layer.forward(torch.randn(3, 5, 6), scalings=some_scalings(2))


def test_embedding_scale_acts_on_the_experts_too():
    target, layer = layer_with(adapters(2, 3, kind="emb"), "emb")
    scaled = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=3.0)
    target.base_layer = scaled
    x, scalings = an_input("emb"), some_scalings(2)
    expected = mixture_by_loop(target, x, scalings[:, :, 1])
    torch.testing.assert_close(layer.forward(x, scalings=scalings), expected)


@pytest.mark.parametrize("kind", ["lin", "emb"])
@pytest.mark.parametrize("ranks", [(2, 2), (2, 3)])
def test_gradients_equal_those_of_the_loop(kind, ranks):
    target, layer = layer_with(adapters(*ranks, kind=kind, lora_bias=kind == "lin"), kind)
    x = an_input(kind)
    scalings = some_scalings(2).requires_grad_()
    inputs = [scalings, *target.lora_A.parameters(), *target.lora_B.parameters(), *target.lora_embedding_A.parameters()]
    inputs += list(target.lora_embedding_B.parameters())
    if kind == "lin":
        inputs.append(x.requires_grad_())
    expected = torch.autograd.grad(mixture_by_loop(target, x, scalings[:, :, 1]).square().sum(), inputs)
    found = torch.autograd.grad(layer.forward(x, scalings=scalings).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_gradients_agree_with_finite_differences():
    target, layer = layer_with(adapters(2, 3))
    target.double()
    scalings = some_scalings(2).double().requires_grad_()
    x = torch.randn(BATCH, SEQ, 6, dtype=torch.float64, requires_grad=True)
    parameters = [*target.lora_A.parameters(), *target.lora_B.parameters()]
    assert torch.autograd.gradcheck(lambda s, x, *_: layer.forward(x, scalings=s), (scalings, x, *parameters))


# -------------------------------------------------------------------------------------- gathering the chosen experts


@pytest.mark.parametrize(
    "options", [{}, {"enable_softmax": False, "enable_softmax_topk": True}], ids=["plain", "softmax"]
)
@pytest.mark.parametrize("tokens", [1, 2])
def test_gathered_experts_add_what_all_of_them_masked_add(tmp_path, tokens, options, monkeypatch):
    paths = {f"e{i}": save_adapter(tiny_llama(), lora(lora_alpha=4 + i), tmp_path / f"{i}", seed=i) for i in range(8)}
    model = quietly(
        weft.from_adapters,
        tiny_llama(),
        paths,
        layerwise_scalings=True,
        top_k_lora=2,
        global_scaling_weight=0.7,
        **options,
    ).eval()
    gathered = []
    plain = XLoraLinearLayer.add_ready

    def counted(self, result, x, stack, ready):
        gathered.append(ready.chosen is not None)
        return plain(self, result, x, stack, ready)

    monkeypatch.setattr(XLoraLinearLayer, "add_ready", counted)
    ids = torch.randint(1, VOCAB, (1, tokens))
    with torch.no_grad():
        found = model(input_ids=ids).logits
        assert gathered == [True] * 6  # two decoder layers of three
        monkeypatch.setattr(XLoraLinearLayer, "add_ready", lambda *args: None)
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_gathering_is_left_where_it_costs_more_or_must_be_trained(tmp_path):
    paths = {f"e{i}": save_adapter(tiny_llama(), lora(), tmp_path / f"{i}", seed=i) for i in range(8)}
    model = quietly(weft.from_adapters, tiny_llama(), paths, top_k_lora=2).eval()
    one, three = torch.ones(1, 1).long(), torch.ones(3, 1).long()
    model(input_ids=one)
    assert model.passes._followed.ready is None  # gradients are wanted
    with torch.no_grad():
        model(input_ids=one)
        assert model.passes._followed.ready.chosen is not None
        model(input_ids=three)
        assert model.passes._followed.ready.chosen is None

"""The gate is peft's X-LoRA classifier: the same keys, shapes and scalings, in float32."""

from types import SimpleNamespace

import pytest
import torch
from peft.tuners.xlora import XLoraConfig as PeftXLoraConfig
from peft.tuners.xlora.classifier import XLoraClassifier as PeftXLoraClassifier
from torch import nn

import weft
from models import quietly, tiny_llama
from weft import XLoraClassifier, XLoraConfig

HIDDEN, EXPERTS, LAYERS = 12, 3, 5
ADAPTERS = {name: name for name in ("math", "code", "chem")}


def gate(num_layers=LAYERS, **options):
    return XLoraClassifier(XLoraConfig(**gate_options(**options)), EXPERTS, num_layers)


def pefts_gate(**options):
    model = nn.Linear(1, 1)  # peft takes the dtype from it
    config = quietly(PeftXLoraConfig, **gate_options(**options))
    return PeftXLoraClassifier(model, config, EXPERTS, LAYERS, torch.device("cpu"))


def gate_options(**options):
    return {"hidden_size": HIDDEN, "adapters": ADAPTERS, "xlora_size": 7, **options}


def hidden_states(batch=2, seq=4):
    return torch.randn(batch, seq, HIDDEN)


def pefts_scalings(classifier, hidden):
    return classifier(SimpleNamespace(hidden_states=[hidden]), input_ids=torch.zeros(hidden.shape[:2]))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layerwise", [True, False])
def test_keys_and_shapes_are_pefts(depth, dropout, layerwise):
    options = {"xlora_depth": depth, "xlora_dropout_p": dropout, "layerwise_scalings": layerwise}
    shapes = {key: value.shape for key, value in gate(**options).state_dict().items()}
    assert shapes == {key: value.shape for key, value in pefts_gate(**options).state_dict().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_temperature": 0.2},
        {"enable_softmax": False},
        {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("layerwise", [True, False])
def test_same_weights_give_pefts_scalings(depth, dropout, layerwise, options):
    options = {"xlora_depth": depth, "xlora_dropout_p": dropout, "layerwise_scalings": layerwise, **options}
    ours, theirs = gate(**options), pefts_gate(**options)
    ours.load_state_dict(theirs.state_dict())
    hidden = hidden_states()
    torch.testing.assert_close(ours.eval()(hidden), pefts_scalings(theirs.eval(), hidden), atol=1e-6, rtol=1e-6)
    # In training the same dropout masks are drawn.
    torch.manual_seed(3)
    in_training = ours.train()(hidden)
    torch.manual_seed(3)
    torch.testing.assert_close(in_training, pefts_scalings(theirs.train(), hidden), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layerwise", [True, False])
def test_output_has_every_layer_and_expert(layerwise):
    scalings = gate(layerwise_scalings=layerwise)(hidden_states(3, 6))
    assert scalings.shape == (3, 6, LAYERS, EXPERTS)
    torch.testing.assert_close(scalings.sum(-1), torch.ones(3, 6, LAYERS))
    layers_agree = torch.equal(scalings, scalings[:, :, :1].expand_as(scalings))
    assert layers_agree is not layerwise


def test_shared_scalings_are_one_layer_repeated_without_a_copy():
    scalings = gate(layerwise_scalings=False, num_layers=1000)(hidden_states())
    assert scalings.shape[2] == 1000
    assert scalings.stride(2) == 0


def test_without_softmax_the_logits_come_out():
    ours = gate(enable_softmax=False, layerwise_scalings=True)
    hidden = hidden_states()
    assert torch.equal(ours(hidden), ours.layers(hidden).view(2, 4, LAYERS, EXPERTS))


def test_temperature_is_read_at_every_call():
    ours, hidden = gate(layerwise_scalings=False), hidden_states()
    logits = ours.layers(hidden)[:, :, None]
    for temperature in (1.0, 0.1, 4.0):
        ours.config.softmax_temperature = temperature
        expected = torch.softmax(logits / temperature, -1).expand(-1, -1, LAYERS, -1)
        torch.testing.assert_close(ours(hidden), expected)


def test_scalings_of_a_token_depend_on_that_token_alone():
    ours, hidden = gate(xlora_depth=2).eval(), hidden_states()
    torch.testing.assert_close(ours(hidden)[:, 1:2], ours(hidden[:, 1:2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_and_scalings_stay_float32_whatever_comes_in(dtype):
    ours, hidden = gate(xlora_depth=2).eval(), hidden_states().to(dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    assert ours(hidden).dtype == torch.float32
    assert torch.equal(ours(hidden), ours(hidden.float()))


@pytest.mark.parametrize(
    ("base_dtype", "gate_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_gate_of_a_model_is_float32_or_wider(base_dtype, gate_dtype, llama_adapters):
    model = weft.from_adapters(tiny_llama().to(base_dtype), llama_adapters)
    assert {parameter.dtype for parameter in model.internal_xlora_classifier.parameters()} == {gate_dtype}
    model(torch.tensor([[1, 2, 3]]))
    assert model.get_latest_scalings().dtype == gate_dtype


def test_another_width_is_an_error_with_both_widths():
    with pytest.raises(ValueError, match=r"hidden_size \(12\) must be the width of .* hidden state \(16\)"):
        gate()(torch.randn(1, 2, 16))


def test_hidden_size_must_be_known():
    with pytest.raises(ValueError, match=r"hidden_size \(None\) must be"):
        gate(hidden_size=None)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("layerwise", [True, False])
def test_gradient_reaches_every_parameter(depth, layerwise):
    ours = gate(xlora_depth=depth, layerwise_scalings=layerwise)
    weight = torch.randn(LAYERS, EXPERTS)
    (ours(hidden_states()) * weight).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in ours.parameters())

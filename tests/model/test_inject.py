"""Adapters that become experts: peft makes their parameters in the base model."""

import pytest
from peft.tuners.lora import LoraLayer, LoraModel

from models import lora, save_adapter, tiny_llama
from weft.checkpoint.adapters import read_adapters
from weft.model.inject import inject_adapters

CONFIGS = {
    "zoo": lora(lora_dropout=0.1),
    "alps": lora(target_modules=["k_proj", "q_proj"]),
    "dora": lora(use_dora=True),
    "more": lora(target_modules=["q_proj", "up_proj"]),
}


@pytest.fixture
def adapters(tmp_path):
    return {
        name: save_adapter(tiny_llama(), config, tmp_path / name, seed=seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    }


def of_adapters(base, names):
    """The paths of all modules and parameters that belong to these adapters."""
    paths = [*dict(base.named_modules()), *dict(base.named_parameters())]
    return {path for path in paths if set(path.split(".")) & set(names)}


def test_adding_an_adapter_does_not_visit_those_before(adapters, monkeypatch):
    base, seen = tiny_llama(), []
    original = LoraModel.inject_adapter

    def inject_adapter(self, model, name, *args, **options):
        seen.append((name, of_adapters(base, set(CONFIGS) - {name})))
        original(self, model, name, *args, **options)

    monkeypatch.setattr(LoraModel, "inject_adapter", inject_adapter)
    inject_adapters(base, read_adapters(adapters, allow_dora=True))
    assert seen == [(name, set()) for name in CONFIGS]


def test_layers_have_all_adapters_in_order_as_peft_alone_leaves_them(adapters):
    base, theirs = tiny_llama(), tiny_llama()
    read = read_adapters(adapters, allow_dora=True)
    inject_adapters(base, read)
    model = LoraModel(theirs, {"zoo": read[0].config}, "zoo")
    for adapter in read[1:]:
        model.peft_config[adapter.name] = adapter.config
        model.inject_adapter(theirs, adapter.name)
    assert list(dict(base.named_modules())) == list(dict(theirs.named_modules()))
    trainable = {name: parameter.requires_grad for name, parameter in theirs.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == trainable
    layer = base.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, LoraLayer)
    assert list(layer.lora_A) == list(layer.lora_B) == list(layer.lora_dropout) == list(CONFIGS)

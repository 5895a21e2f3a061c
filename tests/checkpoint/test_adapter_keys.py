"""Tensors are known by peft's names, whatever tools around the model have put into these."""

import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import lora, quietly, save_adapter, tiny_llama
from weft.checkpoint.adapter_keys import own_keys
from weft.errors import AdapterError, WeftError

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TOKENS = torch.arange(1, 10).view(1, 9)


def base_of_all():
    return tiny_llama(attention_bias=True, mlp_bias=True)


def in_layers(attribute):
    return lambda key: re.sub(r"layers\.(\d+)\.", rf"layers.\1.{attribute}.", key)


def behind_prefix(attribute):
    return lambda key: key.replace(PREFIX, f"{PREFIX}{attribute}.")


def with_name(name):
    def rename(key):
        key = re.sub(r"(lora_[AB])\.(weight|bias)$", rf"\1.{name}.\2", key)
        return re.sub(r"(lora_embedding_[AB]|lora_magnitude_vector)$", rf"\1.{name}", key)

    return rename


FOREIGN = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside of peft": behind_prefix("_orig_mod"),
    "compiled layers": in_layers("_orig_mod"),
    "DDP": lambda key: f"module.{key}",
    "DDP inside of peft": behind_prefix("module"),
    "DDP of a compiled one": lambda key: f"module._orig_mod.{key}",
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}",
    "FSDP layers": in_layers("_fsdp_wrapped_module"),
    "checkpointed layers": in_layers("_checkpoint_wrapped_module"),
    "FSDP and checkpointed": in_layers("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "the adapter's name": with_name("default"),
    "another name of the adapter": with_name("weight"),
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "no prefix, and a name": lambda key: with_name("mine")(key.removeprefix(PREFIX)),
    "twice peft": lambda key: PREFIX + key,
}


def renamed(folder, target, rename):
    """A copy of an adapter with other keys."""
    shutil.copytree(folder, target)
    tensors = {rename(key): value for key, value in load_file(f"{folder}/{TENSORS}").items()}
    save_file(tensors, f"{target}/{TENSORS}")
    return str(target)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """An adapter of every kind of tensor that LoRA has: linear with bias, embedding, DoRA's magnitudes."""
    folder = tmp_path_factory.mktemp("everything")
    options = {
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "bias": {"lora_bias": True},
    }
    return {
        name: save_adapter(base_of_all(), lora(**values), folder / name, seed=seed)
        for seed, (name, values) in enumerate(options.items())
    }


def alone(model, name):
    with torch.no_grad(), model.eval().fixed_scalings({name: 1.0}):
        return model(TOKENS).logits


@pytest.mark.parametrize("rename", FOREIGN.values(), ids=FOREIGN)
def test_keys_of_wrappers_are_pefts_own(rename, everything, tmp_path):
    for name, folder in everything.items():
        path = renamed(folder, tmp_path / name, rename)
        model = weft.from_adapters(base_of_all(), {name: path}, allow_dora=True)
        expected = quietly(peft.PeftModel.from_pretrained, base_of_all(), folder).eval()(TOKENS).logits
        torch.testing.assert_close(alone(model, name), expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained(tmp_path / "mixture" / name)
        saved = load_file(tmp_path / "mixture" / name / "experts" / name / TENSORS)
        assert saved.keys() == {key for key in load_file(f"{folder}/{TENSORS}") if "base_layer" not in key}


def test_a_mixture_that_is_converted_has_pefts_keys(everything, tmp_path):
    paths = {"0": renamed(everything["bias"], tmp_path / "0", FOREIGN["compiled"])}
    weft.from_adapters(base_of_all(), paths).save_pretrained(tmp_path / "mixture")
    weft.convert_mixture(tmp_path / "mixture", "xlora", tmp_path / "xlora")
    shutil.copy(tmp_path / "0" / TENSORS, tmp_path / "xlora/0" / TENSORS)  # as its user has it
    weft.convert_mixture(tmp_path / "xlora", "weft", tmp_path / "weft", base=base_of_all())
    assert (
        load_file(tmp_path / "weft/experts/0" / TENSORS).keys() == load_file(f"{everything['bias']}/{TENSORS}").keys()
    )


def test_a_file_of_two_adapters_is_refused_with_both_names(everything, tmp_path):
    folder = Path(shutil.copytree(everything["bias"], tmp_path / "two"))
    tensors = load_file(folder / TENSORS)
    both = {with_name(name)(key): value + len(name) for name in ("one", "other") for key, value in tensors.items()}
    save_file(both, folder / TENSORS)
    with pytest.raises(
        AdapterError, match=r"adapter 'two': its tensors \S+lora_A\.o\S+ and \S+lora_A\.o\S+ are both \S+"
    ):
        weft.from_adapters(base_of_all(), {"two": str(folder)})


def test_what_is_not_understood_is_named(everything, tmp_path):
    path = renamed(everything["bias"], tmp_path / "strange", in_layers("strange_wrapper"))
    with pytest.raises(AdapterError, match=r"unexpected keys \(18\): \S+layers\.0\.strange_wrapper\."):
        weft.from_adapters(base_of_all(), {"strange": path})


def test_a_module_of_that_name_keeps_it():
    tensors = {f"{PREFIX}a.module.b.lora_A.weight": torch.zeros(1)}
    assert own_keys(tensors) == tensors


# ---------------------------------------------------------------------- compiled base models


IN_PLACE = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("in place", "in place and called")]


@pytest.mark.parametrize("kind", ["wrapper", *IN_PLACE])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.usefixtures("peft_xlora_restored", "without_type_checks")  # which a compiler does not see through
def test_a_base_model_that_was_compiled_takes_experts(kind, llama_adapters, tmp_path):
    expected = weft.from_adapters(tiny_llama(), llama_adapters)
    expected.save_pretrained(tmp_path / "expected")
    let_the_gate_decide_on(tmp_path / "expected")
    expected = weft.from_pretrained(tmp_path / "expected", tiny_llama())
    base = compiled(kind)
    model = weft.from_pretrained(tmp_path / "expected", base)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits)
    model.save_pretrained(tmp_path / "saved")
    assert not any("_orig_mod" in file.read_text() for file in (tmp_path / "saved").rglob("*.json"))
    again = weft.from_pretrained(tmp_path / "saved", tiny_llama())
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, expected(TOKENS).logits)
    unloaded = model.base_model.unload()
    with torch.no_grad():
        torch.testing.assert_close(unloaded(TOKENS).logits, tiny_llama()(TOKENS).logits)
    weft.register_with_peft()
    made = peft.get_peft_model(compiled(kind), weft.XLoraConfig(adapters=llama_adapters))
    assert made.base_model.xlora_config.layer_names == expected.base_model.xlora_config.layer_names


def compiled(kind):
    base = tiny_llama()
    if kind == "wrapper":
        return torch.compile(base, backend="eager")
    base.compile(backend="eager")
    if kind == "in place and called":
        with torch.no_grad():
            base(TOKENS)
    return base


def let_the_gate_decide_on(folder):
    model = weft.from_pretrained(folder, tiny_llama(), is_trainable=True)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(folder)


def test_a_compiled_mixture_is_saved_as_one_that_is_not(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    wrapper = torch.compile(model, backend="eager")
    wrapper.save_pretrained(tmp_path / "mixture", state_dict=wrapper.state_dict())
    assert all(key.startswith("base_model.internal") for key in load_file(tmp_path / "mixture" / TENSORS))
    weft.from_pretrained(tmp_path / "mixture", tiny_llama())


def test_a_base_model_of_which_parts_are_compiled_is_refused(llama_adapters):
    base = tiny_llama()
    base.model.layers[1] = torch.compile(base.model.layers[1], backend="eager")
    with pytest.raises(
        AdapterError, match=r"parts of the base model are compiled \(model.layers.1\): pass it uncompiled"
    ):
        weft.from_adapters(base, llama_adapters)


def test_a_base_model_that_is_wrapped_for_several_devices_is_refused(llama_adapters):
    with pytest.raises(
        WeftError, match=r"the base model is wrapped as DataParallel: pass the model itself \(.module\)"
    ):
        weft.from_adapters(torch.nn.DataParallel(tiny_llama()), llama_adapters)

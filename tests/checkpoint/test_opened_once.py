"""Every tensor file of a mixture is opened once, and what was verified is what is used."""

import copy
import pickle
import shutil
from collections import Counter
from pathlib import Path

import peft
import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import quietly, tiny_llama
from original import make_gate, write_original
from weft.checkpoint.folder import open_mixture
from weft.config import XLoraConfig
from weft.serve.mixture import read_mixture

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(1, 19).view(2, 9)
GATE = (TENSORS,)
EXPERTS = ("experts/code/adapter_model.safetensors", "experts/math/adapter_model.safetensors")
ONCE = Counter((*GATE, *EXPERTS))


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def saved(adapters, folder, **options):
    """A mixture of two experts with a gate that decides."""
    two = {name: adapters[name] for name in ("math", "code")}
    model = weft.from_adapters(tiny_llama(), two, **options)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.normal_()
    quietly(model.save_pretrained, folder)
    return folder


@pytest.fixture
def folder(llama_adapters, tmp_path):
    return saved(llama_adapters, tmp_path / "mixture")


@pytest.fixture
def opens(monkeypatch):
    """How often each file below a folder was opened for its tensors: `opens(folder)`."""
    counted = Counter()

    def counting(opener):
        def opened(file, *args, **kwargs):
            counted[Path(file).resolve()] += 1
            return opener(file, *args, **kwargs)

        return opened

    for module in ("weft.files.tensors", "safetensors.torch"):
        monkeypatch.setattr(f"{module}.safe_open", counting(safetensors.safe_open))

    def below(folder):
        folder = Path(folder).resolve()
        return Counter(
            {str(file.relative_to(folder)): times for file, times in counted.items() if file.is_relative_to(folder)}
        )

    return below


# ---------------------------------------------------------------------- loaded


@pytest.mark.parametrize("options", [{}, {"use_trainable_adapters": True}, {"layerwise_scalings": False}], ids=str)
def test_loading_opens_each_file_once(options, llama_adapters, tmp_path, opens):
    folder = saved(llama_adapters, tmp_path / "mixture", **options)
    before = opens(folder)
    weft.from_pretrained(folder, tiny_llama())
    assert opens(folder) - before == ONCE


def test_loading_with_experts_from_elsewhere_opens_each_file_once(folder, llama_adapters, opens):
    shutil.rmtree(folder / "experts")
    adapters = {name: llama_adapters[name] for name in ("math", "code")}
    before = opens("/")
    weft.from_pretrained(folder, tiny_llama(), adapters=adapters)
    assert set((opens("/") - before).values()) == {1}
    assert (opens("/") - before).total() == 3


def test_loading_the_original_librarys_folder_opens_each_file_once(llama_adapters, tmp_path, opens):
    folder = write_original(tmp_path / "original", make_gate(llama_adapters), llama_adapters)
    before = opens(folder)
    weft.from_pretrained(folder, tiny_llama())
    assert set((opens(folder) - before).values()) == {1}
    assert (opens(folder) - before).total() == 1 + len(llama_adapters)


@pytest.mark.usefixtures("peft_xlora_restored")
def test_peft_opens_the_gate_once_more_and_nothing_else(folder, opens):
    before = opens(folder)
    weft.register_with_peft()
    peft.PeftModel.from_pretrained(tiny_llama(), folder)
    assert opens(folder) - before == ONCE + Counter(GATE)


@pytest.mark.usefixtures("peft_xlora_restored")
def test_transformers_opens_each_file_once(mixture, opens):
    before = opens(mixture)
    weft.register_with_peft()
    transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert opens(mixture) - before == ONCE


def test_a_serving_engine_opens_each_file_once(folder, opens):
    before = opens(folder)
    read_mixture(folder)
    assert opens(folder) - before == ONCE


# ---------------------------------------------------------------------- made into something else


@pytest.mark.parametrize("to", ["weft", "peft", "xlora"])
def test_converting_opens_each_file_once(to, folder, tmp_path, opens):
    before = opens(folder)
    weft.convert_mixture(folder, to, tmp_path / "converted", rename={"math": "0", "code": "1"})
    assert opens(folder) - before == ONCE


@pytest.mark.parametrize("options", [{}, {"use_trainable_adapters": True}], ids=str)
def test_adding_and_dropping_an_expert_open_each_file_once(options, llama_adapters, tmp_path, opens):
    folder = saved(llama_adapters, tmp_path / "mixture", **options)
    before = opens("/")
    weft.add_expert(folder, "new", llama_adapters["adapter_3"], tmp_path / "more", base=tiny_llama())
    counted = opens("/") - before
    assert {file: times for file, times in counted.items() if "more" not in file} == {
        **{str(folder / file)[1:]: 1 for file in ONCE},
        f"{llama_adapters['adapter_3']}/{TENSORS}"[1:]: 1,
    }
    before = opens(folder)
    weft.drop_expert(folder, "math", tmp_path / "fewer")
    assert opens(folder) - before == ONCE


def test_a_push_and_a_card_open_each_file_once(folder, opens):
    before = opens(folder)
    weft.push(folder, "user/mixture", dry_run=True)
    assert opens(folder) - before == ONCE
    before = opens(folder)
    weft.write_card(folder)
    assert opens(folder) - before == ONCE


# ---------------------------------------------------------------------- what is carried


@pytest.mark.usefixtures("peft_xlora_restored")
def test_the_tensors_that_were_verified_are_those_that_are_used(folder, llama_adapters, tmp_path):
    weft.register_with_peft()
    config = XLoraConfig.from_pretrained(folder)
    expected = logits(weft.from_pretrained(folder, tiny_llama()))
    for file in EXPERTS:  # replaced after they were verified
        save_file({key: value + 1 for key, value in load_file(folder / file).items()}, tmp_path / "other")
        shutil.move(tmp_path / "other", folder / file)
    model = peft.PeftModel.from_pretrained(tiny_llama(), folder, config=config).eval()
    assert torch.equal(logits(model), expected)


@pytest.mark.usefixtures("peft_xlora_restored")
def test_a_config_lets_go_of_what_was_read_when_a_model_is_built(folder, opens):
    weft.register_with_peft()
    config = XLoraConfig.from_pretrained(folder)
    before = opens(folder)
    first = quietly(peft.get_peft_model, tiny_llama(), config)
    assert opens(folder) - before == Counter()
    second = quietly(peft.get_peft_model, tiny_llama(), config)
    assert opens(folder) - before == Counter(EXPERTS)
    weights = {"math": 0.3, "code": 0.7}
    with first.fixed_scalings(weights), second.fixed_scalings(weights):
        assert torch.equal(logits(first), logits(second))


@pytest.mark.usefixtures("peft_xlora_restored")
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_no_copy_of_a_config_holds_what_was_read(copied, folder):
    weft.register_with_peft()
    config = XLoraConfig.from_pretrained(folder)
    twin = copied(config)
    assert (twin, twin.folder) == (config, folder)
    assert twin.take_carried() is None
    assert len(config.take_carried().tensors) == 3


def test_a_config_that_is_only_read_holds_no_tensors(folder):
    assert XLoraConfig.from_pretrained(folder).take_carried() is None
    assert open_mixture(folder, keep_experts=False).tensors.keys() == {folder / TENSORS}
    assert open_mixture(folder).tensors.keys() == {folder / file for file in ONCE}


def test_copies_of_trained_experts_are_not_held_beside_the_experts(llama_adapters, tmp_path):
    folder = saved(llama_adapters, tmp_path / "mixture", use_trainable_adapters=True)
    gate = load_file(folder / TENSORS)
    copies = [key for key in gate if ".lora_" in key]
    held = open_mixture(folder).tensors[folder / TENSORS]
    assert copies
    assert {key: (value.shape, value.dtype) for key, value in held.items()} == {
        key: (value.shape, value.dtype) for key, value in gate.items()
    }
    assert {key for key, value in held.items() if value.is_meta} == set(copies)
    own = {value.untyped_storage().nbytes() for key, value in held.items() if not value.is_meta}
    assert max(own) < (folder / TENSORS).stat().st_size / 2

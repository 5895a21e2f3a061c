"""transformers loads a saved mixture by itself, from wherever it is started, once weft is registered with peft."""

import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import let_the_gate_decide, lora, quietly, save_adapter, tiny_tokenizer
from weft.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("peft_xlora_restored")
IDS = torch.arange(5, 15).view(1, -1)


@pytest.fixture
def decided(mixture, tmp_path, monkeypatch):
    """A mixture whose gate decides, used from another directory than its own."""
    let_the_gate_decide(mixture)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    weft.register_with_peft()
    return mixture


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def test_auto_model_is_the_mixture(decided, caplog):
    expected = weft.from_pretrained(decided)
    model = transformers.AutoModelForCausalLM.from_pretrained(decided)
    assert type(model) is transformers.LlamaForCausalLM
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(expected.base_model.unload()))
    assert not model.training
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "xlora" in name)
    assert "LOAD REPORT" not in caplog.text


def test_generate_is_wefts(decided):
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = weft.from_pretrained(decided).generate(IDS, **arguments)
    assert torch.equal(transformers.AutoModelForCausalLM.from_pretrained(decided).generate(IDS, **arguments), expected)


def test_pipeline_generates_what_weft_does(decided):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(decided)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    pipe = transformers.pipeline("text-generation", model=decided, device="cpu")
    shown = quietly(pipe, "the fox", return_tensors=True, **arguments)
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    expected = weft.from_pretrained(decided).generate(ids, **arguments)
    assert shown[0]["generated_token_ids"][-8:] == expected[0, -8:].tolist()


def test_auto_peft_model_and_peft_config_find_the_experts(decided):
    config = peft.PeftConfig.from_pretrained(decided)
    assert config.adapters == weft.XLoraConfig.from_pretrained(decided).adapters
    model = peft.AutoPeftModelForCausalLM.from_pretrained(decided)
    assert torch.equal(logits(model), logits(weft.from_pretrained(decided)))
    lora = peft.PeftConfig.from_pretrained(f"{decided}/experts/math")
    assert type(lora) is peft.LoraConfig


def test_heads_and_new_tokens_come_too(tmp_path, base_folder):
    weft.register_with_peft()
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    new = base.config.vocab_size + 4
    quietly(base.resize_token_embeddings, new, mean_resizing=False)
    path = save_adapter(base, lora(), tmp_path / "words", seed=1)
    model = weft.from_adapters(str(base_folder), {"words": path}).eval()
    model.save_pretrained(tmp_path / "mixture")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    ids = torch.arange(new - 9, new).view(1, -1)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    plain = save_adapter(transformers.AutoModelForCausalLM.from_pretrained(base_folder), lora(), tmp_path / "plain", 2)
    model = weft.from_adapters(str(base_folder), {"plain": plain}, heads=["lm_head"]).eval()
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path / "with-head")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with-head")
    assert torch.equal(logits(loaded, IDS), logits(model, IDS))


def test_a_moved_folder_is_loaded_by_a_path_relative_to_the_present_directory(decided, tmp_path):
    expected = logits(weft.from_pretrained(decided))
    shutil.move(decided, tmp_path / "elsewhere/moved")
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained("moved")), expected)


def test_experts_are_switched_off_and_on_by_transformers(decided, base_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(decided)
    mixed = logits(model)
    model.disable_adapters()
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    assert torch.equal(logits(model), logits(base))
    model.enable_adapters()
    assert torch.equal(logits(model), mixed)


def test_the_model_moves_with_its_gate(decided):
    model = transformers.AutoModelForCausalLM.from_pretrained(decided)
    before = logits(model)
    model.double()
    torch.testing.assert_close(logits(model).float(), before, atol=1e-5, rtol=1e-5)
    assert model.internal_xlora_classifier.layers[-1].weight.dtype == torch.float64


def test_saving_it_by_transformers_is_refused_with_what_to_do(decided, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(decided)
    with pytest.raises(
        CheckpointError, match=r"cannot be saved by transformers, .*: load the mixture with weft.from_pre"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_second_mixture_takes_the_place_of_the_first(decided):
    model = transformers.AutoModelForCausalLM.from_pretrained(decided)
    expected = logits(model)
    with pytest.warns(UserWarning, match="carried an earlier mixture, of .* which is removed"):
        model.load_adapter(decided, adapter_name="second")
    assert torch.equal(logits(model), expected)


def test_a_lost_gate_is_named(decided):
    file = f"{decided}/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "bias" not in key}, file)
    with pytest.raises(CheckpointError, match=r"missing keys \(1\): base_model.internal_xlora_classifier"):
        transformers.AutoModelForCausalLM.from_pretrained(decided)


def test_unregistered_peft_reads_configs_as_it_did(decided):
    weft.unregister_from_peft()
    own = peft.config.PeftConfigMixin.__dict__["from_pretrained"]
    assert own.__func__.__module__ == "peft.config"

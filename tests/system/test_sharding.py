"""Experts in shards: one process and FSDP2 on the CPU, where a shard is the whole but lives as a shard does."""

import os

import peft
import pytest
import torch

import weft
from models import VOCAB, quietly, tiny_llama
from processes import free_port
from weft.errors import AdapterError, CheckpointError


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


@pytest.fixture
def one_process(monkeypatch):
    """A process group of this process alone, in which FSDP is to come."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    place = f"tcp://127.0.0.1:{free_port()}"
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def mixture(adapters, **options):
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama(), adapters, layerwise_scalings=True, **options).eval()


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_base_model().model.layers:
        quietly(fully_shard, layer)
    return quietly(fully_shard, model)


def gathered(model):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 has no FSDP2 on the CPU")
@pytest.mark.parametrize("options", [{}, {"gate_layer": 1}, {"scaling_pass_layers": 1}], ids=str)
def test_a_sharded_model_has_the_outputs_and_gradients_of_a_whole_one(llama_adapters, ids, one_process, options):
    whole = mixture(llama_adapters, use_trainable_adapters=True, **options)
    model = sharded(mixture(llama_adapters, use_trainable_adapters=True, **options))
    for _ in range(2):
        with torch.no_grad():  # in which the weights of few tokens are made ready for all layers ahead
            torch.testing.assert_close(model(input_ids=ids).logits, whole(input_ids=ids).logits, atol=1e-5, rtol=0)
        expected, found = whole(input_ids=ids, labels=ids), model(input_ids=ids, labels=ids)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-5, rtol=0)
        expected.loss.backward()
        found.loss.backward()
        gradients = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], atol=1e-5, rtol=0)
        for each in (whole, model):
            optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1, foreach=False)
            optimizer.step()
            optimizer.zero_grad()


def test_a_sharded_model_is_saved_from_its_gathered_state(
    llama_adapters, ids, one_process, tmp_path, peft_xlora_restored
):
    expected = mixture(llama_adapters)(input_ids=ids).logits
    model = sharded(mixture(llama_adapters))
    with pytest.raises(CheckpointError, match=r"expert tensor base_model\.lora_model\.\S+ is sharded over several"):
        peft.PeftModel.save_pretrained(model, tmp_path / "unregistered", state_dict=gathered(model))
    weft.register_with_peft()
    with pytest.raises(CheckpointError, match=r"gather it with accelerator\.get_state_dict\(model\) in all"):
        model.save_pretrained(tmp_path / "shards")
    model.save_pretrained(tmp_path / "mixture", state_dict=gathered(model))
    with torch.no_grad():
        found = weft.from_pretrained(tmp_path / "mixture", tiny_llama())(input_ids=ids).logits
    torch.testing.assert_close(found, expected)


def test_parameters_that_others_keep_stay_where_they_are(llama_adapters, ids, monkeypatch):
    expected = mixture(llama_adapters)(input_ids=ids).logits
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    model = mixture(llama_adapters)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    torch.testing.assert_close(model(input_ids=ids).logits, expected)
    model.generate(input_ids=ids, max_new_tokens=1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_an_expert_that_is_not_there_is_named(llama_adapters, ids, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    model = mixture(llama_adapters)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["code"].weight.data = torch.empty(0)  # as ZeRO-3 does
    with pytest.raises(AdapterError, match=r"expert 'code' has an empty lora_A here, as ZeRO-3 leaves"):
        model(input_ids=ids)


def test_in_a_process_group_an_unwrapped_model_goes_on_with_its_stacks(llama_adapters, ids):
    place = f"tcp://127.0.0.1:{free_port()}"
    expected = mixture(llama_adapters)(input_ids=ids).logits
    torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
    try:
        model = mixture(llama_adapters).double().float()
        experts = model.get_base_model().model.layers[0].self_attn.q_proj.forward.__self__.experts
        assert experts.stacks() is experts.stacks()
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    finally:
        torch.distributed.destroy_process_group()
        assert "ACCELERATE_USE_FSDP" not in os.environ

"""Tools around a model behave as with a plain peft model: compile, autocast, accelerate, DDP, Trainer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from models import VOCAB, is_expert, lora, quietly, randomise, save_adapter, tiny_llama
from weft.errors import ConfigError


@pytest.fixture
def ids():
    return torch.randint(1, VOCAB, (2, 7))


def mixture(adapters, **options):
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama(), adapters, layerwise_scalings=True, **options).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


COMPILED = """
import sys, torch, weft
from models import is_expert, tiny_llama

def mixture():
    torch.manual_seed(1)
    return weft.from_adapters(tiny_llama(), {"math": sys.argv[1], "code": sys.argv[2]}, layerwise_scalings=True).eval()

ids = torch.arange(1, 8)[None]
with torch.no_grad():
    expected = mixture()(input_ids=ids).logits
    for whole in (True, False):
        model = mixture()
        if whole:
            compiled = torch.compile(model, backend="eager")
        else:
            model.get_base_model().compile(backend="eager")
            compiled = model
        torch.testing.assert_close(compiled(input_ids=ids).logits, expected)
        doubled = {key: value * 2 for key, value in model.state_dict().items() if is_expert(key)}
        model.load_state_dict(doubled, strict=False, assign=True)
        found = compiled(input_ids=ids).logits
        assert not torch.allclose(found, expected)
        torch._dynamo.reset()
        eager = mixture()
        eager.load_state_dict(doubled, strict=False)
        torch.testing.assert_close(found, eager(input_ids=ids).logits)
"""


@pytest.mark.slow
def test_a_fresh_model_may_be_compiled_and_still_follows_its_adapters(llama_adapters):
    # In a process of its own: the shape checks of this suite do not go together with torch.compile.
    paths = [llama_adapters["math"], llama_adapters["code"]]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, *paths], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_first_forward_in_inference_mode_does_not_hinder_training(llama_adapters, ids):
    model = mixture(llama_adapters, use_trainable_adapters=True)
    model.double().float()  # new storage: the stacks are made anew
    with torch.inference_mode():
        model(input_ids=ids)
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("softmax", [True, False])
def test_under_autocast_the_gate_stays_in_float32(llama_adapters, ids, softmax):
    model = mixture(llama_adapters, enable_softmax=softmax)
    seen = []
    model.internal_xlora_classifier.register_forward_hook(
        lambda module, args, output: seen.append((args[0].float(), output))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits(model, ids)
    hidden, scalings = seen[0]
    assert scalings.dtype == torch.float32
    torch.testing.assert_close(scalings, model.internal_xlora_classifier(hidden))


def test_under_autocast_a_base_layer_that_stays_in_float32_is_not_rounded(tmp_path):
    config = lora(target_modules=["embed_tokens"])
    path = save_adapter(tiny_llama(), config, tmp_path / "words", seed=1)
    model = quietly(weft.from_adapters, tiny_llama(), {"words": path})
    ids = torch.arange(5)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), model.fixed_scalings({}):
        layer = model.get_input_embeddings()
        found = layer(ids, scalings=torch.zeros(1, 5, 1, 1))
        assert torch.equal(found, layer.base_layer(ids))


def test_state_dicts_hold_tensors_of_their_own(llama_adapters, ids, tmp_path):
    model = mixture(llama_adapters)
    expected = logits(model, ids)
    experts = {key: value for key, value in model.state_dict().items() if is_expert(key)}
    assert len({value.untyped_storage().data_ptr() for value in experts.values()}) == len(experts)
    save_file(experts, tmp_path / "experts.safetensors")
    randomise(model, 8)
    assert not torch.equal(logits(model, ids), expected)
    model.load_state_dict(load_file(tmp_path / "experts.safetensors"), strict=False)
    assert torch.equal(logits(model, ids), expected)


def test_accelerate_saves_and_restores_the_whole_state(llama_adapters, ids, tmp_path):
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(mixture(llama_adapters))
    expected = logits(model, ids)
    accelerator.save_state(str(tmp_path / "state"))
    randomise(model, 8)
    accelerator.load_state(str(tmp_path / "state"))
    assert torch.equal(logits(model, ids), expected)


def test_ddp_gives_the_gradients_of_an_unwrapped_model(llama_adapters, ids):
    def gradients(model, call):
        for _ in range(2):
            model.zero_grad()
            call(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain = mixture(llama_adapters, use_trainable_adapters=True)
    expected = gradients(plain, plain)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        model = mixture(llama_adapters, use_trainable_adapters=True)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        found = gradients(model, wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_data_parallel_replicas_are_refused(llama_adapters, ids):
    replica = mixture(llama_adapters).get_base_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"X-LoRA cannot run in torch\.nn\.DataParallel"):
        replica(input_ids=ids)


def test_a_change_of_an_expert_between_forward_and_backward_is_an_error(llama_adapters, ids):
    model = mixture(llama_adapters, use_trainable_adapters=True)
    loss = model(input_ids=ids, labels=ids).loss
    randomise(model, 5)
    with pytest.raises(RuntimeError, match="changed in place between the forward and its backward pass"):
        loss.backward()


def test_recomputation_that_does_not_know_the_scalings_is_an_error(llama_adapters, ids):
    from torch.utils.checkpoint import checkpoint

    model = mixture(llama_adapters)
    layer = model.get_base_model().model.layers[0]
    plain = layer.forward
    layer.forward = lambda *args, **kwargs: (
        checkpoint(plain, *args, use_reentrant=True, **kwargs)
        if not kwargs
        else (checkpoint(lambda *inputs: plain(*inputs, **kwargs), *args, use_reentrant=True))
    )
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(torch.is_grad_enabled()))
    with pytest.raises(RuntimeError, match="recomputed in the backward pass without the scalings"):
        quietly(model, input_ids=ids, labels=ids).loss.backward()


def arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        learning_rate=0.05,
        save_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        label_names=["labels"],
        **options,
    )


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(1, VOCAB, (16, 6), generator=generator)
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


@pytest.mark.parametrize("train_experts", [False, True])
def test_a_users_own_trainer_resumes_where_it_stopped(llama_adapters, rows, tmp_path, train_experts):
    def run(**resume):
        model = mixture(llama_adapters, use_trainable_adapters=train_experts)
        trainer = transformers.Trainer(model, arguments(tmp_path / "run", max_steps=4), train_dataset=rows)
        quietly(trainer.train, **resume)
        return model.state_dict()

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_users_own_trainer_takes_the_best_checkpoint_with_its_experts(llama_adapters, rows, tmp_path):
    model = mixture(llama_adapters, use_trainable_adapters=True)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 6}
    trainer = transformers.Trainer(
        model, arguments(tmp_path / "run", **options), train_dataset=rows[:8], eval_dataset=rows[8:]
    )
    quietly(trainer.train)
    assert quietly(trainer.evaluate)["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_a_loaded_mixture_is_frozen_also_where_its_experts_were_trained(llama_adapters, tmp_path):
    mixture(llama_adapters, use_trainable_adapters=True).save_pretrained(tmp_path / "mixture")
    loaded = weft.from_pretrained(tmp_path / "mixture", tiny_llama())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.set_adapter("default")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, _ in loaded.named_parameters() if is_expert(n) or "internal_xlora" in n
    }


def test_options_that_exclude_each_other_are_refused_later_too(llama_adapters):
    model = mixture(llama_adapters, enable_softmax=False, enable_softmax_topk=True, top_k_lora=2)
    with pytest.raises(ConfigError, match=r"enable_softmax_topk \(True\) needs top_k_lora \(None\)"):
        model.set_topk_lora(None)
    assert model.xlora_config.top_k_lora == 2


def test_the_mixture_cannot_be_deleted_and_a_lost_expert_is_named(llama_adapters, ids):
    model = mixture(llama_adapters)
    with pytest.raises(ValueError, match="adapter 'default' cannot be deleted"):
        model.delete_adapter("default")
    model.base_model.lora_model.delete_adapter("math")
    with pytest.raises(ValueError, match=r"the scalings are for 3 experts, but layer 0 has 2 active"):
        logits(model, ids)


def test_an_empty_sequence_gives_an_empty_result(llama_adapters):
    layer = mixture(llama_adapters).get_base_model().model.layers[0].self_attn.q_proj
    assert layer(torch.zeros(2, 0, 32), scalings=torch.zeros(2, 0, 8, 3)).shape == (2, 0, 32)


def test_the_folder_says_where_its_experts_are(llama_adapters, tmp_path):
    mixture(llama_adapters).save_pretrained(tmp_path / "mixture")
    file = tmp_path / "mixture/adapter_config.json"
    values = json.loads(file.read_text())
    values["adapters"]["math"], values["adapters"]["code"] = values["adapters"]["code"], values["adapters"]["math"]
    file.write_text(json.dumps(values))
    with pytest.raises(weft.errors.CheckpointError, match=r"adapters has 'experts/code' for 'math', expected"):
        weft.from_pretrained(tmp_path / "mixture", tiny_llama())


def test_a_model_without_one_last_hidden_state_is_named(llama_adapters):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**small, "vocab_size": 16, "max_position_embeddings": 8},
        vision_config={**small, "image_size": 8, "patch_size": 4},
        projection_dim=8,
    )
    from weft.base_model.backbone import Backbone

    backbone = Backbone(transformers.CLIPModel(config))
    inputs = {"input_ids": torch.ones(1, 3, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)}
    with pytest.raises(ValueError, match=r"CLIPModel\) gives no last_hidden_state"):
        backbone.last_hidden_state(inputs)

"""The gate's own LoRA: it acts in the scaling pass, in every path of it, and nowhere else."""

import copy
import json

import pytest
import torch
from torch import nn

import weft
from models import VOCAB, quietly, tiny_llama, tiny_tokenizer, weft_model
from weft.cli import main
from weft.errors import CheckpointError, ConfigError, TrainingError
from weft.passes.scaling_lora import linear_layers

OWN = {"scaling_pass_layers": 1, "scaling_pass_rank": 3, "layerwise_scalings": True}


def ids_and_mask():
    ids = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def stirred(model):
    """Give the LoRA and the gate weights so large that they matter."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.internal_xlora_classifier.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def mixture(adapters, base=None, **options):
    return stirred(weft.from_adapters(base or tiny_llama(), adapters, **{**OWN, **options})).eval()


def logits(model):
    with torch.no_grad():
        return model(**ids_and_mask()).logits


def lora_of(model):
    return model.internal_xlora_classifier.scaling_pass_lora


# ---------------------------------------------------------------------- where it acts


def test_a_new_one_changes_nothing(llama_adapters):
    with_it = weft.from_adapters(tiny_llama(), llama_adapters, **OWN).eval()
    without = weft.from_adapters(tiny_llama(), llama_adapters, **{**OWN, "scaling_pass_rank": None}).eval()
    without.internal_xlora_classifier.layers.load_state_dict(with_it.internal_xlora_classifier.layers.state_dict())
    assert torch.equal(logits(with_it), logits(without))


def test_the_gate_reads_a_base_model_with_the_lora_merged_and_the_experts_act_in_one_without(decoder):
    model = stirred(weft_model(decoder, **OWN))
    logits(model)
    found = model.get_latest_scalings()
    merged = weft_model(decoder, scaling_pass_layers=1)
    merged.internal_xlora_classifier.layers.load_state_dict(model.internal_xlora_classifier.layers.state_dict())
    fixed = dict.fromkeys(model.xlora_config.expert_names, 0.4)
    with model.fixed_scalings(fixed), merged.fixed_scalings(fixed):
        assert torch.equal(logits(model), logits(merged))
    with torch.no_grad():
        for name, module in linear_layers(merged.passes.backbone, 1).items():
            layer = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            part = lora_of(model).get_submodule(name)
            change = part.up @ part.down
            layer.weight.add_(change if isinstance(layer, nn.Linear) else change.T)
    logits(merged)
    torch.testing.assert_close(found, merged.get_latest_scalings(), rtol=1e-3, atol=1e-4)


def test_it_adapts_every_linear_layer_of_the_scaling_pass_and_no_other(llama_adapters):
    names = [f"model.layers.0.{name}" for name in ("self_attn", "mlp")]
    found = {name.rpartition(".")[0] for name, _ in lora_of(mixture(llama_adapters)).named_parameters()}
    assert len(found) == 7
    assert all(name.startswith(tuple(names)) for name in found)


def test_switched_off_or_unloaded_the_base_model_is_as_it_was(llama_adapters):
    model, expected = mixture(llama_adapters), logits(tiny_llama())
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    base = model.base_model.unload()
    assert torch.equal(logits(base), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


# ---------------------------------------------------------------------- every path of a scaling pass


@pytest.mark.parametrize("strategy", [{}, {"num_beams": 3}], ids=str)
def test_cached_generation_is_uncached_generation(decoder, strategy):
    model = stirred(weft_model(decoder, **OWN))
    found = quietly(model.generate, **ids_and_mask(), max_new_tokens=7, do_sample=False, **strategy)
    expected = model.generate(**ids_and_mask(), max_new_tokens=7, do_sample=False, use_cache=False, **strategy)
    assert torch.equal(found[:, : expected.shape[1]], expected)


def test_padding_and_later_tokens_change_nothing(llama_adapters):
    model, ids = mixture(llama_adapters), ids_and_mask()["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=ids[:1, 3:]).logits
        torch.testing.assert_close(logits(model)[:1, 3:], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(input_ids=ids[:1, 3:6]).logits, alone[:, :3], rtol=1e-4, atol=1e-5)


def test_saved_copied_and_frozen_models_compute_the_same(llama_adapters, tmp_path):
    model = mixture(llama_adapters)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = weft.from_pretrained(tmp_path / "saved", tiny_llama())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(twin), expected)
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for parameter in lora_of(model).parameters():
            parameter.zero_()
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)


def test_experts_that_come_and_go_leave_it(llama_adapters, tmp_path):
    two = {name: llama_adapters[name] for name in ("math", "code")}
    model = mixture(two)
    model.save_pretrained(tmp_path / "saved")
    more = weft.add_expert(tmp_path / "saved", "new", llama_adapters["adapter_3"], base=tiny_llama())
    again = weft.from_pretrained(weft.drop_expert(more, "new", tmp_path / "again"), tiny_llama())
    assert torch.equal(logits(again), logits(model))


def test_half_precision_rounds_and_no_more(llama_adapters):
    model = mixture(llama_adapters)
    logits(model)
    expected = model.get_latest_scalings()
    half = mixture(llama_adapters, tiny_llama().bfloat16())
    half.internal_xlora_classifier.load_state_dict(model.internal_xlora_classifier.state_dict())
    assert {parameter.dtype for parameter in lora_of(half).parameters()} == {torch.float32}
    logits(half)
    torch.testing.assert_close(half.get_latest_scalings(), expected, rtol=0, atol=0.1)


# ---------------------------------------------------------------------- training


def rows(number=64, length=12):
    """The first token names the expert of all tokens of a sequence, which say nothing of it themselves."""
    draws = torch.Generator().manual_seed(1)
    made = []
    for place in range(number):
        tokens = torch.randint(10, VOCAB, (length,), generator=draws)
        tokens[0] = place % 2
        made.append({"input_ids": tokens.tolist(), "expert_labels": [place % 2] * length})
    return made


def test_with_it_the_gate_remembers_what_a_text_began_with(llama_adapters):
    found = {}
    for rank in (None, 8):
        model = weft.from_adapters(tiny_llama(), llama_adapters, **{**OWN, "scaling_pass_rank": rank})
        found[rank] = weft.fit_gate(model, rows(512), "labels", batch_size=64)
    assert found[8] > 0.9
    assert found[8] > found[None] + 0.1


@pytest.mark.parametrize("by", ["labels", "losses"])
def test_the_fit_trains_it_and_nothing_but_the_gate(by, llama_adapters):
    options = {**OWN, "use_trainable_adapters": True, "scaling_pass_value": 0.2}
    model = weft.from_adapters(tiny_llama(), llama_adapters, **options).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    weft.fit_gate(model, rows(8), by)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "internal_xlora_classifier" in name}
    assert not any(parameter.requires_grad for parameter in lora_of(model).parameters())
    assert all(parameter.requires_grad for parameter in model.internal_xlora_classifier.layers.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training


def test_the_fit_says_which_part_takes_the_time(llama_adapters, monkeypatch, capsys):
    monkeypatch.setattr("weft.screen.countdown.EVERY", 0.0)
    weft.fit_gate(mixture(llama_adapters), rows(8), "losses")
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert [what for what, before in zip(said, ["", *said], strict=False) if what != before] == [
        "reading",
        "training the gate's own LoRA",
        "reading",
    ]


def test_the_training_after_the_fit_leaves_it(llama_adapters):
    model = mixture(llama_adapters).train()
    model(**ids_and_mask(), labels=ids_and_mask()["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in lora_of(model).parameters())
    assert all(parameter.grad is not None for parameter in model.internal_xlora_classifier.layers.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError("a loss is not finite")], ids=str)
def test_a_fit_that_ends_early_leaves_it_as_it_was(error, llama_adapters, monkeypatch):
    model = mixture(llama_adapters)
    before, calls = copy.deepcopy(model.state_dict()), []
    run = model.passes.scaling_pass_to_train

    def fail(arguments):
        calls.append(1)
        if len(calls) > 3:
            raise error
        return run(arguments)

    monkeypatch.setattr(model.passes, "scaling_pass_to_train", fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else TrainingError):
        weft.fit_gate(model, rows(8), "labels")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in lora_of(model).parameters())


def test_the_cache_of_scaling_passes_is_that_of_this_lora(llama_adapters, tmp_path):
    model, sequences = mixture(llama_adapters), [row["input_ids"] for row in rows(4)]
    cache = weft.ScalingCache.build(model, sequences, tmp_path, announce=lambda line: None)
    expected = model.passes.scaling_pass_alone({"input_ids": torch.tensor(sequences[:1])})[0]
    torch.testing.assert_close(cache[0], expected)
    with torch.no_grad():
        next(lora_of(model).parameters()).mul_(2)
    other = weft.ScalingCache.build(model, sequences, tmp_path, announce=lambda line: None)
    assert other.folder != cache.folder


def test_weft_train_trains_it_saves_it_and_goes_on_from_it(llama_adapters, tmp_path, capsys):
    base, data = tmp_path / "base", tmp_path / "data.jsonl"
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data.write_text("".join(json.dumps({"text": f"text {number} of some words"}) + "\n" for number in range(16)))
    arguments = ["train", "--base", str(base), "--data", f"math={data}", f"code={data}", "--sequence-length", "32"]
    arguments += ["--adapters", *(f"{name}={llama_adapters[name]}" for name in ("math", "code"))]
    arguments += ["--max-steps", "2", "--scaling-pass-layers", "1", "--scaling-pass-rank", "2"]
    # The adapters are of a smaller vocabulary, which no layer of theirs depends on.
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    trained = weft.from_pretrained(tmp_path / "out")
    assert trained.xlora_config.scaling_pass_rank == 2
    values = lora_of(trained).state_dict()
    assert all(value.abs().sum() > 0 for value in values.values())
    more = ["train", "--start-from", str(tmp_path / "out"), "--data", str(data), "--max-steps", "1"]
    assert main([*more, "--sequence-length", "32", "--output", str(tmp_path / "more")]) == 0
    again = lora_of(weft.from_pretrained(tmp_path / "more")).state_dict()
    assert all(torch.equal(value, values[name]) for name, value in again.items())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scaling_pass_layers": None}, r"scaling_pass_rank \(3\) needs scaling_pass_layers \(None\)"),
        ({"scaling_pass_rank": 0}, r"scaling_pass_rank \(0\) must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, message, llama_adapters):
    with pytest.raises(ConfigError, match=message):
        weft.from_adapters(tiny_llama(), llama_adapters, **{**OWN, **options})


def test_a_training_without_the_fit_is_refused(llama_adapters, tmp_path, capsys):
    arguments = ["train", "--base", str(tmp_path), "--data", "data.jsonl", "--gate-start", "random"]
    arguments += ["--adapters", f"math={llama_adapters['math']}", f"code={llama_adapters['code']}"]
    assert main([*arguments, "--scaling-pass-layers", "1", "--scaling-pass-rank", "2"]) == 1
    assert "scaling_pass_rank (2) and gate_start (random) exclude each other" in " ".join(
        capsys.readouterr().err.split()
    )


def test_a_lora_that_is_larger_than_the_memory_is_refused(llama_adapters):
    base = tiny_llama()
    with pytest.raises(ConfigError, match=r"scaling_pass_rank \(10000000000\) makes a LoRA of [\d,]+ weights"):
        weft.from_adapters(base, llama_adapters, **{**OWN, "scaling_pass_rank": 10**10})
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_a_scaling_pass_without_linear_layers_is_refused(llama_adapters, monkeypatch):
    monkeypatch.setattr("weft.passes.scaling_lora.linear_layers", lambda backbone, number: {})
    base = tiny_llama()
    with pytest.raises(ConfigError, match=r"scaling_pass_rank \(3\) needs linear layers in the first 1 decoder layers"):
        weft.from_adapters(base, llama_adapters, **OWN)
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_a_folder_with_another_rank_is_refused(llama_adapters, tmp_path):
    mixture(llama_adapters).save_pretrained(tmp_path / "saved")
    config = tmp_path / "saved" / "adapter_config.json"
    config.write_text(config.read_text().replace('"scaling_pass_rank": 3', '"scaling_pass_rank": 4'))
    base = tiny_llama()
    with pytest.raises(CheckpointError, match="scaling_pass_lora"):
        weft.from_pretrained(tmp_path / "saved", base)
    assert torch.equal(logits(base), logits(tiny_llama()))

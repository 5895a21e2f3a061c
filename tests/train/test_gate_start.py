"""Gates that start from a fit: by labels, by the experts' losses, in every scheme and through `weft train`."""

import copy
import itertools
import json
import math
from pathlib import Path

import datasets
import pytest
import torch
from transformers import LlamaForSequenceClassification

import accelerate
import weft
from models import is_expert, quietly, tiny_llama, tiny_tokenizer
from weft.cli import main
from weft.errors import ConfigError, DataError, TrainingError
from weft.train.gate_fit import LEAST_LABELS, LEAST_TOKENS, _read, most_tokens
from weft.train.gate_targets import moments, posterior, states_of, targets_of

SCHEMES = [
    {},
    {"layerwise_scalings": True},
    {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16},
    {"scaling_pass_layers": 1, "softmax_temperature": 0.5},
    {"gate_layer": 1, "layerwise_scalings": True},
    {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
]


def rows(number=48, length=12):
    """Two kinds of tokens, of which the label is plain to see."""
    draws = torch.Generator().manual_seed(1)
    made = []
    for place in range(number):
        low = torch.randint(0, 5, (length,), generator=draws)
        kinds = (torch.arange(length) + place) // 4 % 2
        made.append({"input_ids": (low + 20 * kinds).tolist(), "expert_labels": (2 * kinds).tolist()})
    return made


def shares(model, row):
    with torch.no_grad():
        model(input_ids=torch.tensor([row["input_ids"]]))
    scalings = model.get_latest_scalings()
    return scalings if model.xlora_config.enable_softmax else scalings.softmax(-1)


def test_the_layers_above_the_one_the_gate_reads_at_are_not_run_for_labels(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, gate_layer=1, layerwise_scalings=True)
    ran = []
    for number, layer in enumerate(model.get_base_model().model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    assert weft.fit_gate(model, rows(), "labels", batch_size=16) > 0.9
    assert ran == [0, 0, 0]
    # Nothing of these passes is left: a call past the model's own finds every expert at weight 1.
    assert model.passes.carrier.routing is None
    ids = torch.tensor([rows()[0]["input_ids"]])
    with torch.no_grad():
        inner = model.get_base_model().model(input_ids=ids).last_hidden_state
        fresh = weft.from_adapters(tiny_llama(), llama_adapters, gate_layer=1).get_base_model().model(input_ids=ids)
    assert torch.equal(inner, fresh.last_hidden_state)


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_a_gate_fitted_to_labels_follows_them_in_every_layer(options, llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, **options)
    model.train()
    experts = {name: copy.deepcopy(value) for name, value in model.named_parameters() if is_expert(name)}
    assert weft.fit_gate(model, rows(), "labels") > 0.9
    assert model.training
    row = rows(number=30)[-1]
    model.eval()
    before = 4 if "gate_layer" in options else 0  # LoRA layers that follow no gate
    found = shares(model, row)[0, :, before:].argmax(-1)  # [token, layer]
    assert (found == torch.tensor(row["expert_labels"])[:, None]).float().mean() > 0.9
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in experts.items())


def test_what_is_fitted_is_kept_by_saving_and_by_training_on(llama_adapters, tmp_path):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    weft.fit_gate(model, rows(), "labels")
    assert all(value.requires_grad for value in model.internal_xlora_classifier.parameters())
    quietly(model.save_pretrained, tmp_path / "mixture")
    again = weft.from_pretrained(tmp_path / "mixture", tiny_llama())
    assert torch.equal(shares(model.eval(), rows()[0]), shares(again.eval(), rows()[0]))


def test_losses_are_the_posterior_over_all_ways_in_which_the_experts_took_turns():
    losses = torch.rand(1, 5, 3, dtype=torch.float64) * 8
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for turns in itertools.product(range(3), repeat=5):
        changes = sum(one != other for one, other in itertools.pairwise(turns))
        weight = (1 / 128) ** changes * (63 / 64) ** (4 - changes)
        weight *= math.exp(-sum(losses[0, token, expert].item() for token, expert in enumerate(turns)))
        for token, expert in enumerate(turns):
            expected[token, expert] += weight
    torch.testing.assert_close(posterior(losses)[0], expected / expected.sum(-1, keepdim=True))
    padded = torch.cat([losses, torch.zeros(1, 4, 3)], 1)
    torch.testing.assert_close(posterior(padded)[:, :5], posterior(losses))
    assert torch.equal(posterior(losses[..., :1]), torch.ones(1, 5, 1))


def test_a_gate_fitted_to_losses_prefers_the_expert_that_loses_least(llama_adapters):
    # Of these experts one is of no effect, and one is so large that it spoils the model.
    model = weft.from_adapters(tiny_llama(), llama_adapters, layerwise_scalings=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B.math" in name:
                value.zero_()
            elif "lora_B" in name:
                value.mul_(30)
    examples = [{"input_ids": [5, 6] * 8} for _ in range(12)]
    tokens = torch.tensor([examples[0]["input_ids"]])
    losses = []
    for name in llama_adapters:
        with model.fixed_scalings({name: 1.0}), torch.no_grad():
            losses.append(model(input_ids=tokens, labels=tokens).loss.item())
    weft.fit_gate(model, examples)
    model.eval()
    found = shares(model, examples[0]).mean((0, 1, 2))
    assert found.argmax() == torch.tensor(losses).argmin()


def test_the_mixtures_weight_changes_nothing_in_the_losses_of_the_experts(llama_adapters):
    gates = []
    for weight in (1.0, 3.0):
        torch.manual_seed(0)
        model = weft.from_adapters(tiny_llama(), llama_adapters, global_scaling_weight=weight)
        weft.fit_gate(model, rows(8))
        assert model.get_global_scaling_weight() == weight
        gates.append([value.clone() for value in model.internal_xlora_classifier.parameters()])
    for one, other in zip(*gates, strict=True):
        assert torch.equal(one, other)


def test_padding_and_the_order_of_examples_in_a_batch_change_nothing(llama_adapters):
    examples = [{**row, "input_ids": row["input_ids"][: 6 + place % 7]} for place, row in enumerate(rows())]
    examples = [{**row, "expert_labels": row["expert_labels"][: len(row["input_ids"])]} for row in examples]
    gates = []
    for batch_size in (1, 5):
        torch.manual_seed(0)
        model = weft.from_adapters(tiny_llama(), llama_adapters)
        weft.fit_gate(model, examples, "labels", batch_size=batch_size)
        gates.append([value.clone() for value in model.internal_xlora_classifier.parameters()])
    for one, other in zip(*gates, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_the_fit_leaves_the_random_numbers_that_follow_alone(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    weft.fit_gate(model, rows(8), "labels")
    assert torch.equal(torch.rand(4), expected)


def test_one_example_is_enough_and_its_agreement_unknown(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    assert math.isnan(weft.fit_gate(model, rows(1), "labels"))
    row = rows(1)[0]
    assert (shares(model.eval(), row)[0, :, 0].argmax(-1) == torch.tensor(row["expert_labels"])).all()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_gate_is_fitted_in_full_precision_whatever_surrounds_it(depth, llama_adapters):
    base = tiny_llama()
    # A large mean, as channels of real models have it.
    base.model.norm.register_forward_hook(lambda norm, given, output: output + torch.linspace(-30, 30, 32))
    model = weft.from_adapters(base, llama_adapters, xlora_depth=depth, xlora_size=16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert weft.fit_gate(model, rows(), "labels") > 0.9
    row = rows(number=30)[-1]
    found = shares(model.eval(), row)[0, :, 0].argmax(-1)
    assert (found == torch.tensor(row["expert_labels"])).float().mean() > 0.9


def test_a_channel_that_varies_by_rounding_only_says_nothing(llama_adapters):
    base = tiny_llama()

    def nearly_constant(norm, given, output):
        output = output.clone()
        output[..., 0] = 0.1 * (1 + 1e-7 * torch.rand(output.shape[:-1]))
        return output

    base.model.norm.register_forward_hook(nearly_constant)
    model = weft.from_adapters(base, llama_adapters)
    assert weft.fit_gate(model, rows(), "labels") > 0.9
    assert model.internal_xlora_classifier.layers[0].weight[:, 0].abs().max() < 1


def test_examples_without_labels_are_left_out_and_the_tokens_are_bounded(llama_adapters):
    said = []
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    without = [{"input_ids": [1, 2] * 300}] * (LEAST_TOKENS // 500)
    assert weft.fit_gate(model, [*without, *rows(16)], "labels", announce=said.append) > 0.9
    assert said == ["fitting the gate to the labels of 192 tokens of 16 sequences"]
    weft.fit_gate(model, without[:60], announce=said.append)
    assert f"losses of {LEAST_TOKENS:,} tokens of 55 sequences" in said[1]


def test_more_tokens_are_read_where_no_expert_reads_them(llama_adapters):
    said = []
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    labelled = [{"input_ids": [1, 2] * 256, "expert_labels": [0, 1] * 256}] * (LEAST_TOKENS // 512 + 2)
    weft.fit_gate(model, labelled, "labels", batch_size=32, announce=said.append)
    assert said == [f"fitting the gate to the labels of {LEAST_TOKENS + 1024:,} tokens of 66 sequences"]
    assert [most_tokens("labels", number, 576) for number in (2, 8, 32)] == [LEAST_LABELS, LEAST_LABELS, 2**20]
    assert [most_tokens("labels", 32, size) for size in (2048, 8192, 2**20)] == [2**20, 2**18, LEAST_TOKENS]
    assert most_tokens("losses", 32, 576) == LEAST_TOKENS


def test_hidden_states_are_kept_as_the_base_model_gives_them(llama_adapters):
    """In bfloat16 they take half of the memory, and are the same numbers."""
    model = weft.from_adapters(tiny_llama().bfloat16(), llama_adapters)
    examples = [{**row, "expert_labels": torch.tensor(row["expert_labels"])} for row in rows(8)]
    hidden, shares = _read(model.eval(), examples, 2, "labels", 3, seed=0)
    assert hidden.dtype == torch.bfloat16
    targets = targets_of(model, examples, "labels")
    with torch.no_grad():
        one_by_one = [states_of(model, [row], [target])[0] for row, target in zip(examples, targets, strict=True)]
    torch.testing.assert_close(hidden, torch.cat(one_by_one))
    assert [len(one) for one in shares] == [len(one.shares) for one in targets]


def test_moments_are_those_of_all_tokens_in_float32():
    hidden = 100 + torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0))
    hidden[:, 2] = 5.0
    for given in (hidden, hidden.bfloat16()):
        mean, deviation = moments(given)
        torch.testing.assert_close(mean, given.double().mean(0).float())
        torch.testing.assert_close(deviation[:2], given.double().std(0, correction=0)[:2].float())
        assert deviation[2] == 1


@pytest.mark.parametrize("by", ["labels", "losses"])
def test_a_base_that_is_offloaded_is_read_where_it_runs(by, llama_adapters):
    plain = weft.from_adapters(tiny_llama(), llama_adapters)
    model = weft.from_adapters(accelerate.cpu_offload(tiny_llama(), execution_device="cpu"), llama_adapters)
    assert weft.fit_gate(model, rows(16), by) == weft.fit_gate(plain, rows(16), by)


def test_a_text_for_which_the_model_gives_nan_leaves_the_gate_as_it_was(llama_adapters):
    base = tiny_llama()
    with torch.no_grad():
        base.model.embed_tokens.weight[3] = torch.nan
    model = weft.from_adapters(base, llama_adapters)
    before = [value.clone() for value in model.internal_xlora_classifier.parameters()]
    for by in ("labels", "losses"):
        with pytest.raises(TrainingError, match="hidden states or the experts' losses are NaN or infinite"):
            weft.fit_gate(model, rows(), by)
    assert all(torch.equal(*pair) for pair in zip(before, model.internal_xlora_classifier.parameters(), strict=True))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"expert_labels of example 0 have shape \[2\], expected \[3\]: one for each token"),
        (1, r"expert_labels of example 0 have shape \[\], expected \[3\]"),
        ([0, 3, 1], r"expert_labels of example 0 have 3, expected the number of an expert, 0 to 2, or -100 for none"),
        ([0, -1, 1], r"expert_labels of example 0 have -1, expected"),
    ],
)
def test_wrong_labels_are_named(labels, message, llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    with pytest.raises(DataError, match=message):
        weft.fit_gate(model, [{"input_ids": [1, 2, 3], "expert_labels": labels}], "labels")


@pytest.fixture
def for_texts(llama_adapters):
    """Makes a mixture for texts of the tiny tokenizer."""

    def make(**options):
        base = tiny_llama(vocab_size=len(tiny_tokenizer()), **options)
        torch.manual_seed(0)
        return weft.from_adapters(base, llama_adapters, layerwise_scalings=True)

    return make


def gate(model):
    return model.internal_xlora_classifier.state_dict()


def test_texts_are_fitted_as_their_tokens_are(for_texts):
    tokenizer, texts = tiny_tokenizer(), ["def f(x):", "the contract", "says", "x = 3", "hereby"]
    given = {
        "texts": texts,
        "rows": [{"text": text} for text in texts],
        "input_ids": [{"input_ids": ids} for ids in tokenizer(texts)["input_ids"]],
        "ids": tokenizer(texts)["input_ids"],
        "data set": datasets.Dataset.from_dict({"text": texts}),
    }
    found = {}
    for name, examples in given.items():
        model = for_texts()
        weft.fit_gate(model, examples, tokenizer=tokenizer)
        found[name] = gate(model)
    assert all(torch.equal(values[key], found["ids"][key]) for values in found.values() for key in values)


def test_texts_have_their_labels_by_name(for_texts):
    tokenizer, said = tiny_tokenizer(), []
    texts = [{"text": "abab" * 3, "expert": "math"}, {"text": "xyxy" * 3, "expert": "adapter_3"}] * 12
    texts += [{"text": "nobody's"}, {"text": "abyxyx", "experts": [[0, "math"], [2, "adapter_3"]]}]
    assert weft.fit_gate(for_texts(), texts, "labels", tokenizer=tokenizer, announce=said.append) > 0.9
    assert said == ["fitting the gate to the labels of 294 tokens of 25 sequences"]
    with pytest.raises(DataError, match=r"example 0: the label 'law' must be one of the experts \['math', 'code', "):
        weft.fit_gate(for_texts(), [{"text": "ab", "expert": "law"}], "labels", tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"none of the examples has one \(expert_labels\)"):
        weft.fit_gate(for_texts(), ["some", "texts"], "labels", tokenizer=tokenizer)


@pytest.mark.parametrize(("positions", "sequences"), [(128, 10), (2048, 3)])
def test_long_texts_are_cut_into_sequences(positions, sequences, for_texts):
    said = []
    model = for_texts(max_position_embeddings=positions)
    weft.fit_gate(model, ["x" * 1280], tokenizer=tiny_tokenizer(), announce=said.append)
    assert f" of 1,280 tokens of {sequences} sequences" in said[0]


def test_a_generator_of_examples_is_a_list_of_them(llama_adapters):
    model, other = (weft.from_adapters(tiny_llama(), llama_adapters) for _ in range(2))
    assert weft.fit_gate(model, (row for row in rows(8)), "labels") == weft.fit_gate(other, rows(8), "labels")


def test_a_tokenizer_in_the_place_of_by_is_named_in_short(llama_adapters, without_type_checks):
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    with pytest.raises(ConfigError) as raised:
        weft.fit_gate(model, ["one", "two"], tiny_tokenizer())
    kind = type(tiny_tokenizer()).__name__
    assert raised.value.problems == [f"by ({kind}) must be 'labels' or 'losses': give the tokenizer with tokenizer="]
    with pytest.raises(ConfigError) as raised:
        weft.fit_gate(model, ["one", "two"], 3)
    assert raised.value.problems == ["by (int) must be 'labels' or 'losses'"]


def test_what_cannot_be_fitted_is_an_error(llama_adapters):
    model = weft.from_adapters(tiny_llama(), llama_adapters, enable_softmax=False)
    before = [value.clone() for value in model.internal_xlora_classifier.parameters()]
    with pytest.raises(ConfigError, match=r"enable_softmax \(False\) must be true: .*") as raised:
        weft.fit_gate(model, rows(), "votes", batch_size=0)
    assert "by ('votes') must be 'labels' or 'losses'" in str(raised.value)
    assert "batch_size (0) must be at least 1" in str(raised.value)
    assert all(torch.equal(*pair) for pair in zip(before, model.internal_xlora_classifier.parameters(), strict=True))
    model = weft.from_adapters(tiny_llama(), llama_adapters)
    with pytest.raises(DataError, match=r"none of the examples has one \(expert_labels\)"):
        weft.fit_gate(model, [{"input_ids": [1, 2, 3]}], "labels")
    with pytest.raises(DataError, match="the examples hold no text of two tokens or more"):
        weft.fit_gate(model, [{"input_ids": [1]}])
    with pytest.raises(ConfigError, match=r"tokenizer \(None\) must be given with a text \('(one|two)'\)"):
        weft.fit_gate(model, ["one", "two"])
    for examples, kind in (("one text", "str"), ({"text": ["one", "two"]}, "dict"), (None, "None")):
        with pytest.raises(ConfigError, match=rf"examples \({kind}\) must be a list of texts or rows: \[...\]"):
            weft.fit_gate(model, examples, tokenizer=tiny_tokenizer())
    with pytest.raises(ConfigError, match=r"model \(LlamaForCausalLM\) must be a mixture of weft's"):
        weft.fit_gate(tiny_llama(), rows())
    for block in (model.disable_adapter(), model.fixed_scalings({"math": 1.0})):
        with block, pytest.raises(ConfigError, match="the gate is not asked inside disable_adapter"):
            weft.fit_gate(model, rows())
    classifier = weft.from_adapters(LlamaForSequenceClassification(tiny_llama().config), llama_adapters)
    with pytest.raises(ConfigError, match=r"by \('losses'\) needs a causal language model, .*, and LlamaForSeq"):
        weft.fit_gate(classifier, rows())
    model.passes.backbone.is_encoder_decoder = True  # as T5's is
    with pytest.raises(ConfigError, match="LlamaForCausalLM is an encoder-decoder: its gate reads two texts"):
        weft.fit_gate(model, rows())


# ---------------------------------------------------------------------- weft train


@pytest.fixture
def arguments(llama_adapters, tmp_path):
    base = tmp_path / "base"
    quietly(tiny_llama(vocab_size=len(tiny_tokenizer())).save_pretrained, base)
    tiny_tokenizer().save_pretrained(base)
    texts = [f"{'seven ' * 5}{'return ' * 5}" for _ in range(12)]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps({"text": t, "experts": [[0, "math"], [30, "code"]]}) + "\n" for t in texts))
    adapters = [f"{name}={llama_adapters[name]}" for name in ("math", "code")]
    options = ["--base", str(base), "--adapters", *adapters, "--data", str(data), "--sequence-length", "64"]
    return ["train", *options, "--output", str(tmp_path / "out")]


def test_training_starts_from_the_fit(arguments, tmp_path, capsys):
    assert main([*arguments, "--gate-start", "labels", "--max-steps", "1", "--learning-rate", "1e-6"]) == 0
    shown = capsys.readouterr().out
    assert "fitting the gate to the labels of " in shown
    assert "of the held-out tokens" in shown
    model, tokenizer = weft.from_pretrained(tmp_path / "out"), tiny_tokenizer()
    for number, word in enumerate(("seven", "return")):
        inputs = tokenizer(f"{word} {word} {word}", return_tensors="pt")
        assert shares(model, {"input_ids": inputs.input_ids[0].tolist()}).mean((0, 1, 2))[number] > 0.8


@pytest.mark.parametrize(
    ("row", "by"),
    [
        ({"text": "seven return", "expert": "code"}, "labels"),
        ({"text": "seven return"}, "losses"),
        ({"text": "seven return", "experts": [[0, "math"], [6, None]]}, "losses"),
        ({"text": "seven return", "expert": "law"}, "losses"),
        ({"text": "seven return", "experts": "math"}, "losses"),
    ],
)
def test_without_a_gate_start_labels_are_used_if_they_are_complete(row, by, arguments, capsys):
    data = Path(arguments[arguments.index("--data") + 1])
    data.write_text(data.read_text() + json.dumps(row))
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert f"fitting the gate to the {by} of " in capsys.readouterr().out


@pytest.mark.parametrize(("names", "by"), [(("math", "code"), "labels"), (("math", "math"), "losses")])
def test_labels_are_complete_if_each_expert_has_some(names, by, arguments, tmp_path, capsys):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("seven return")
    place = arguments.index("--data") + 1
    arguments[place : place + 1] = [f"{name}={tmp_path / f'{number}.txt'}" for number, name in enumerate(names)]
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert f"fitting the gate to the {by} of " in capsys.readouterr().out


def test_training_from_a_mixture_is_not_fitted_again(arguments, tmp_path, capsys):
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert "fitting the gate to the labels of " in capsys.readouterr().out
    again = [*arguments[arguments.index("--data") :][:4], "--output", str(tmp_path / "again"), "--max-steps", "1"]
    assert main(["train", "--start-from", str(tmp_path / "out"), *again]) == 0
    assert "fitting the gate" not in capsys.readouterr().out


def test_what_cannot_be_fitted_starts_at_random_unless_it_was_asked_for(arguments, monkeypatch, capsys):
    def spoiled(*args, **kwargs):
        raise TrainingError("the hidden states hold NaN")

    monkeypatch.setattr("weft.train.start.fit_gate", spoiled)
    assert main([*arguments, "--max-steps", "1"]) == 0
    assert "the gate starts at random: the hidden states hold NaN" in capsys.readouterr().out
    asked = [*arguments[:-1], arguments[-1] + "2", "--gate-start", "losses", "--max-steps", "1"]
    assert main(asked) == 1
    assert "the hidden states hold NaN" in capsys.readouterr().err


def test_a_resumed_training_does_not_start_again(arguments, tmp_path, capsys):
    options = [*arguments, "--gate-start", "losses", "--save-steps", "1"]
    assert main([*options, "--max-steps", "2"]) == 0
    assert "with each of 2 experts" in capsys.readouterr().out
    assert main([*options, "--max-steps", "3", "--resume", "true"]) == 0
    assert "fitting the gate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("environment", "options", "message"),
    [
        ({}, ["--start-from", "{out}"], "gate_start (labels) and start_from ({out}) exclude each other"),
        ({"ACCELERATE_USE_FSDP": "true"}, [], "gate_start (labels) needs the whole model in each process, not shards"),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            ["--scaling-pass-layers", "1", "--scaling-pass-rank", "2"],
            "scaling_pass_rank (2) needs the whole model in each process, not shards",
        ),
    ],
)
def test_options_that_exclude_a_fit_are_named(environment, options, message, arguments, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")
    if "--start-from" in options:
        assert main([*arguments, "--max-steps", "1"]) == 0
        arguments = ["train", *arguments[arguments.index("--data") :][:4], "--output", str(tmp_path / "other")]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = [option.format(out=out) for option in options]
    assert main([*arguments, *given, "--gate-start", "labels", "--max-steps", "1"]) == 1
    assert message.format(out=out) in capsys.readouterr().err

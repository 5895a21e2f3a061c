"""Folders of the original xlora library give the logits of the mixture they hold."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import quietly, tiny_llama
from original import OPTIONS, make_gate, original_logits, write_original
from weft.cli import main
from weft.errors import CheckpointError, ConfigError

TOKENS = torch.arange(1, 19).view(2, 9)
CONFIG, GATE = "xlora_config.json", "xlora_classifier.safetensors"


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def change_config(folder, **values):
    file = folder / CONFIG
    saved = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({name: value for name, value in saved.items() if value != "left out"}))


@pytest.fixture
def folder(llama_adapters, tmp_path):
    """A folder of the original library, for a test to change."""
    return write_original(tmp_path / "original", make_gate(llama_adapters, xlora_depth=2), llama_adapters)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


GATES = {
    f"depth {depth}, {'ReLU' if relu else 'linear'}, {'bias' if bias else 'no bias'}, dropout {dropout}": {
        "xlora_depth": depth,
        "enable_relu_and_dropout": relu,
        "use_bias": bias,
        "xlora_dropout_p": dropout,
    }
    for depth, relu, bias, dropout in [
        (1, True, True, 0.2),
        (1, False, False, 0.2),
        (2, True, True, 0.2),
        (2, False, True, 0.2),
        (3, True, True, 0.0),
        (3, True, False, 0.2),
        (3, False, True, 0.0),
        (5, True, True, 0.2),
        (5, False, False, 0.2),
    ]
}


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_gate_of_every_kind_gives_the_originals_logits(options, llama_adapters, tmp_path):
    gate = make_gate(llama_adapters, **options)
    folder = write_original(tmp_path / "original", gate, llama_adapters)
    model = weft.from_pretrained(folder, tiny_llama())
    close(logits(model), original_logits(gate, llama_adapters, TOKENS))
    assert not model.training


@pytest.mark.parametrize(
    "options",
    [
        {"layerwise_scalings": False},
        {"softmax_temperature": 0.3, "global_scaling_weight": 1.7},
        {"top_k_lora": 2},
        {"enable_softmax": False},
    ],
    ids=str,
)
def test_options_mean_what_they_meant(options, llama_adapters, tmp_path):
    gate = make_gate(llama_adapters, **options)
    model = weft.from_pretrained(write_original(tmp_path / "original", gate, llama_adapters), tiny_llama())
    close(logits(model), original_logits(gate, llama_adapters, TOKENS))


# The layouts of the two mixtures that the paper's authors published, with small tensors.
PUBLISHED = {
    "nine adapters, depth 1, bfloat16": (
        [f"adapter_{number}" for number in range(1, 10)],
        {"xlora_depth": 1, "enable_relu_and_dropout": True, "global_scaling_weight": "left out"},
    ),
    "four adapters, depth 2, few options": (
        [f"adapter_{number}" for number in range(1, 5)],
        {
            "xlora_depth": 2,
            "enable_relu_and_dropout": True,
            "softmax_temperature": "left out",
            "scaling_pass_value": "left out",
        },
    ),
}


@pytest.mark.parametrize(("names", "options"), PUBLISHED.values(), ids=PUBLISHED)
@pytest.mark.parametrize("on_the_hub", [False, True], ids=["folder", "Hub"])
def test_published_layouts_load(names, options, on_the_hub, llama_adapters, tmp_path, request):
    repositories = request.getfixturevalue("hub") if on_the_hub else tmp_path
    sources = list(llama_adapters.values())
    adapters = {name: sources[number % len(sources)] for number, name in enumerate(names)}
    gate = make_gate(adapters, **{key: value for key, value in options.items() if value != "left out"}).bfloat16()
    folder = write_original(repositories / "tiny" / "mixture", gate, adapters, named="table", dtype=torch.bfloat16)
    change_config(folder, **{key: value for key, value in options.items() if value == "left out"})
    model = weft.from_pretrained("tiny/mixture" if on_the_hub else folder, tiny_llama())
    close(logits(model), original_logits(gate.float(), adapters, TOKENS))
    assert model.xlora_config.expert_names == names


def test_experts_in_another_repository_are_fetched_from_their_folders_there(hub, llama_adapters, tmp_path):
    gate = make_gate(llama_adapters)
    folder = write_original(hub / "tiny" / "mixture", gate, llama_adapters, named="table")
    only_gate = tmp_path / "gate"
    only_gate.mkdir()
    for file in (CONFIG, GATE):
        shutil.copy(folder / file, only_gate)
    close(logits(weft.from_pretrained(only_gate, tiny_llama())), original_logits(gate, llama_adapters, TOKENS))


@pytest.mark.parametrize("below", ["", "adapters"])
@pytest.mark.parametrize("named", ["list", "table"])
def test_experts_are_found_in_the_folder(below, named, llama_adapters, tmp_path):
    gate = make_gate(llama_adapters)
    folder = write_original(tmp_path / "original", gate, llama_adapters, below=below, named=named)
    close(logits(weft.from_pretrained(folder, tiny_llama())), original_logits(gate, llama_adapters, TOKENS))


def test_experts_that_are_not_named_must_be_given_in_order(llama_adapters, tmp_path):
    gate = make_gate(llama_adapters)
    folder = write_original(tmp_path / "original", gate, llama_adapters, named=None)
    message = r"does not name its adapters: give them .* adapters in the folder: adapter_3, code, math$"
    with pytest.raises(CheckpointError, match=message):
        weft.from_pretrained(folder, tiny_llama())
    model = weft.from_pretrained(folder, tiny_llama(), adapters=llama_adapters)
    close(logits(model), original_logits(gate, llama_adapters, TOKENS))


def test_given_adapters_replace_those_of_the_folder(folder, llama_adapters):
    expected = logits(weft.from_pretrained(folder, tiny_llama()))
    for name in llama_adapters:
        shutil.rmtree(folder / name)
    again = weft.from_pretrained(folder, tiny_llama(), adapters=dict(reversed(llama_adapters.items())))
    assert torch.equal(logits(again), expected)
    with pytest.raises(ConfigError, match=r"expert_names \(.*\) must be the names in adapters \(\['math'\]\)"):
        weft.from_pretrained(folder, tiny_llama(), adapters={"math": llama_adapters["math"]})


def test_saved_again_it_is_a_folder_of_wefts(folder, tmp_path):
    model = weft.from_pretrained(folder, tiny_llama())
    quietly(model.save_pretrained, tmp_path / "weft")
    assert torch.equal(logits(weft.from_pretrained(tmp_path / "weft", tiny_llama())), logits(model))


def test_gate_can_be_trained_further(folder):
    model = weft.from_pretrained(folder, tiny_llama(), is_trainable=True)
    model(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None for p in model.internal_xlora_classifier.parameters())


def test_commands_take_such_a_folder(base_folder, base_adapters, tmp_path, capsys):
    gate = make_gate(base_adapters)
    folder = write_original(tmp_path / "original", gate, base_adapters)
    change_config(folder, base_model_id=str(base_folder))
    assert main(["generate", str(folder), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"use_mean_pool": True}, CheckpointError, r"use_mean_pool \(true\): the gate decides once for a whole text"),
        (
            {"enable_softmax": False, "enable_softmax_topk": True, "top_k_lora": 2},
            CheckpointError,
            r"enable_softmax_topk \(true\), which the original library computes over all tokens of a batch",
        ),
        ({"xlora_dept": 2}, ConfigError, rf"{CONFIG} cannot be read:\n.*xlora_dept .* mean xlora_depth"),
        ({"top_k_lora": 9}, ConfigError, r"top_k_lora \(9\) must be between 1 and the number of adapters \(3\)"),
        (
            {"xlora_depth": 3},
            CheckpointError,
            rf"{CONFIG} does not fit .*{GATE}:\n  - xlora_depth \(3\) must be 2, as its linear layers are inner.0",
        ),
        ({"xlora_depth": 1}, CheckpointError, r"unexpected: \['inner.0.bias', 'inner.0.weight'\]"),
        (
            {"xlora_size": 8},
            CheckpointError,
            rf"{GATE}:\n  - xlora_size \(8\) must be 16, the width of its hidden layers",
        ),
        ({"hidden_size": 16}, CheckpointError, rf"{GATE}:\n  - hidden_size \(16\) must be 32, the width that it reads"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_named(values, error, message, folder):
    change_config(folder, **values)
    with pytest.raises(error, match=message):
        weft.from_pretrained(folder, tiny_llama())


def test_a_gate_from_before_decisions_per_token_is_warned_of(folder):
    change_config(folder, stop_token_id=2)
    with pytest.warns(UserWarning, match=r"stop_token_id \(2\): if it was saved before xlora decided token by token"):
        weft.from_pretrained(folder, tiny_llama())


def test_gate_as_a_pickle_is_not_opened(folder):
    (folder / GATE).unlink()
    (folder / "xlora_classifier.pt").write_bytes(b"never read")
    with pytest.raises(CheckpointError, match=r"holds the gate as a pickle \(xlora_classifier.pt\)"):
        weft.from_pretrained(folder, tiny_llama())


def test_some_biases_are_no_gate(folder):
    tensors = load_file(folder / GATE)
    del tensors["inner.0.bias"]
    save_file(tensors, folder / GATE)
    with pytest.raises(CheckpointError, match=re.escape("with a bias: ['last']")):
        weft.from_pretrained(folder, tiny_llama())


def test_base_model_is_found_by_its_saved_name(folder, base_folder, llama_adapters):
    assert weft.XLoraConfig.from_pretrained(folder).base_model_name_or_path == OPTIONS["base_model_id"]
    with pytest.raises(CheckpointError, match=r"base \(tiny/llama\) cannot be loaded"):
        weft.from_pretrained(folder)

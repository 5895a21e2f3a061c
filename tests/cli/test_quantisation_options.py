"""The command line's `quantization`: every command takes it, and says what to install where that is missing."""

import io
import json

import pytest
import torch

import weft.base_model.loading
from models import lora, save_adapter, tiny_tokenizer
from quantised import wide_llama
from weft.base_model.loading import load_base
from weft.cli import main
from weft.errors import CheckpointError, ConfigError
from weft.model.build import load_mixture

bnb = pytest.importorskip("bitsandbytes")

LAYERS = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide-base")
    tokenizer = tiny_tokenizer()
    wide_llama(vocab_size=len(tokenizer), max_position_embeddings=1024).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide-adapters")
    vocabulary = len(tiny_tokenizer())
    return {
        name: save_adapter(wide_llama(vocab_size=vocabulary), lora(), folder / name, seed=seed)
        for seed, name in enumerate(("math", "code"), start=1)
    }


@pytest.mark.parametrize("kind", LAYERS)
def test_all_commands_run_on_a_base_that_is_quantised_while_it_is_loaded(folder, adapters, tmp_path, capsys, kind):
    data, out = tmp_path / "texts.jsonl", str(tmp_path / "out")
    data.write_text("\n".join(json.dumps({"text": f"the quick brown fox {i} " * 4}) for i in range(8)))
    quantised = ["--quantization", kind]
    experts = [f"{name}={path}" for name, path in adapters.items()]
    few = ["--max-steps", "2", "--batch-size", "2", "--sequence-length", "16", "--xlora-size", "8"]
    command = ["train", "--base", str(folder), "--adapters", *experts, "--data", str(data), "--output", out]
    assert main([*command, *few, *quantised]) == 0
    assert main(["eval", out, "--data", f"fox={data}", "--sequence-length", "16", *quantised]) == 0
    assert "uniform mix" in capsys.readouterr().out
    assert main(["generate", out, "--prompt", "the quick", "--max-new-tokens", "3", *quantised]) == 0
    assert capsys.readouterr().out.startswith("the quick")
    fold = ["fold", out, "--output", str(tmp_path / "folded"), "--data", str(data), "--sequence-length", "16"]
    assert main([*fold, *quantised]) == 0
    model, _ = load_mixture(out, None, "auto", kind)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert type(layer.base_layer) is LAYERS[kind]


def test_chat_runs_on_a_quantised_base(folder, adapters, tmp_path, monkeypatch):
    weft.from_adapters(str(folder), adapters, xlora_size=8).save_pretrained(tmp_path / "out")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/exit\n"))
    assert main(["chat", str(tmp_path / "out"), "--max-new-tokens", "3", "--quantization", "nf4"]) == 0


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_four_bit_layers_compute_in_the_dtype_of_the_base(folder, dtype, expected):
    layer = load_base(str(folder), dtype, "nf4").model.layers[0].mlp.up_proj
    assert (layer.weight.quant_state.quant_type, layer.compute_dtype) == ("nf4", expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_the_library_it_says_what_to_install(folder, monkeypatch, kind):
    monkeypatch.setattr(weft.base_model.loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"quantization \('{kind}'\) needs the package bitsandbytes.*pip install"):
        load_base(str(folder), "auto", kind)
    assert type(load_base(str(folder), "auto").model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_base_that_is_not_there_is_named_with_a_quantization_too():
    with pytest.raises(CheckpointError, match=r"base \(/nowhere\) cannot be loaded: .* causal language model"):
        load_base("/nowhere", "auto", "nf4")


def test_another_quantization_is_wrong_usage(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "anything", "--prompt", "x", "--quantization", "int3"])
    error = capsys.readouterr().err
    assert "quantization" in error
    assert "int3" in error
    assert "nf4" in error

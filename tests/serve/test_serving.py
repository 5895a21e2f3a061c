"""What of serving needs no engine: the folder as plain tensors, what is refused, and whose flags are whose."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import lora, quietly, save_adapter, tiny_llama
from weft.cli import main
from weft.cli.parser import parse
from weft.errors import CheckpointError, ConfigError
from weft.serve.mixture import padded_rank, read_mixture

TOKENS = torch.arange(1, 9).view(1, 8)


@pytest.fixture
def saved(llama_adapters, tmp_path):
    def save(adapters=llama_adapters, **options):
        model = weft.from_adapters(tiny_llama(), adapters, **options).eval()
        quietly(model.save_pretrained, tmp_path / "mixture")
        return tmp_path / "mixture", model

    return save


def test_the_plain_tensors_are_those_of_the_model(saved):
    folder, model = saved()
    mixture = read_mixture(folder)
    assert mixture.experts == ("math", "code", "adapter_3")
    assert list(mixture.layers) == model.xlora_config.layer_names
    base = model.get_base_model()
    for layer in mixture.layers:
        module = base.get_submodule(layer)
        for name, factors in zip(mixture.experts, mixture.factors[layer], strict=True):
            assert (factors is None) == (name not in module.lora_A)
            if factors is not None:
                assert torch.equal(factors.down, module.lora_A[name].weight)
                assert torch.equal(factors.up, module.lora_B[name].weight)
                assert factors.scaling == pytest.approx(module.scaling[name])
    (weight, bias), own = mixture.gate[0], model.internal_xlora_classifier.layers[0]
    assert torch.equal(weight, own.weight)
    assert torch.equal(bias, own.bias)
    assert padded_rank(mixture.factors["model.layers.0.self_attn.q_proj"]) == 6


def test_patterns_of_ranks_and_alphas_are_pefts(saved, tmp_path):
    config = lora(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*v_proj": 3, "v_proj": 5}, use_rslora=True)
    adapters = {"a": save_adapter(tiny_llama(), config, tmp_path / "a", 1)}
    folder, model = saved(adapters)
    mixture, base = read_mixture(folder), model.get_base_model()
    for layer in mixture.layers:
        assert mixture.factors[layer][0].scaling == pytest.approx(base.get_submodule(layer).scaling["a"])


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, "a scaling pass, then the adapted pass"),
        ({"scaling_pass_layers": 1}, "a scaling pass of 1 decoder layers, then the adapted pass"),
        ({"gate_layer": 1}, "one pass, the gate at decoder layer 1"),
    ],
    ids=str,
)
def test_schemes(options, scheme, saved):
    folder, model = saved(**options)
    mixture = read_mixture(folder)
    assert mixture.scheme == scheme
    assert mixture.following() == range(model.passes.routings.first_layer, len(mixture.layers))
    assert (mixture.following().start > 0) == ("gate_layer" in options)


def test_what_no_engine_can_serve_is_refused_by_name(saved, tmp_path):
    dora = {"d": save_adapter(tiny_llama(), lora(use_dora=True), tmp_path / "d", 1)}
    folder, _ = saved(dora, allow_dora=True)
    with pytest.raises(ConfigError, match=r"model \(.*mixture\) cannot be served:\n  - expert 'd' uses DoRA"):
        read_mixture(folder)
    head = {"h": save_adapter(tiny_llama(), lora(target_modules=["q_proj", "lm_head"]), tmp_path / "h", 1)}
    folder, _ = saved(head)
    with pytest.raises(ConfigError, match=r"layers \['lm_head'\] are adapted outside of the decoder layers"):
        read_mixture(folder)


def test_what_is_no_mixture_is_refused(llama_adapters, tmp_path):
    with pytest.raises(CheckpointError, match="is no mixture that weft saved"):
        read_mixture(llama_adapters["math"])
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        read_mixture(tmp_path)


def test_what_was_altered_is_refused(saved):
    folder, _ = saved()
    file = folder / "adapter_model.safetensors"
    tensors = {key: value + 1 for key, value in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"is not as it was saved:\n  - adapter_model.safetensors: changed tensors"
    ):
        read_mixture(folder)


def test_flags_of_vllm_are_handed_on():
    given = parse(
        "serve",
        [
            "mix",
            "--port",
            "1",
            "--max-model-len",
            "64",
            "--enforce-eager",
            "--host=0.0.0.0",
            "--dtype=auto",
            "-tp",
            "2",
        ],
    )
    assert given.values == {"model": "mix", "port": 1, "host": "0.0.0.0"}
    assert given.handed_on == ["--max-model-len", "64", "--enforce-eager", "--dtype=auto", "-tp", "2"]
    assert parse("serve", ["mix", "--api_key=x"]).values == {"model": "mix", "api_key": "x"}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_without_vllm_the_command_says_what_is_missing(saved, capsys):
    folder, _ = saved()
    assert main(["serve", str(folder), "--engine", "vllm"]) == 1
    assert "engine ('vllm') needs vLLM, which is not installed here: pip install vllm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--pipeline-parallel-size", "2"], "--pipeline-parallel-size cannot be used with a mixture: the gate of a"),
        (["-pp=2"], "--pipeline-parallel-size cannot be used with a mixture"),
        (["--enable-lora"], "--enable-lora cannot be used with a mixture: the experts are in the mixture already"),
        (["--speculative-config", "{}"], "--speculative-config cannot be used with a mixture"),
        (["--served-model-name", "x"], "--served-model-name is set by weft serve itself"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "mix").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["serve", "mix", *flags]) == 1
    assert message in capsys.readouterr().err


def test_the_parts_that_run_inside_an_engine_import_nothing_of_peft():
    code = "import sys, weft.serve.mixture, weft.serve.following; "
    code += "print(sorted({'peft', 'transformers'} & {*sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(shown.replace("'", '"')) == []

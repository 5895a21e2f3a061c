"""Code that a base model brings along runs where its user asked for it by name, never because of what is piped in."""

import ast
import io
import json
from pathlib import Path

import pytest
import torch
import transformers

import weft
from weft.cli import main
from weft.errors import CheckpointError

ROOT = Path(__file__).parents[2]
REFUSED = r"needs code that it brings along, which was not run: read it, and if you trust it, give --trust-remote-code"
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path):
    """There once the base's code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def own_base(base_folder, tmp_path, marker, monkeypatch):
    """A base model that transformers knows nothing of: its folder has the code."""
    folder = tmp_path / "own-base"
    transformers.AutoModelForCausalLM.from_pretrained(base_folder).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(base_folder).save_pretrained(folder)
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", architectures=["OwnModel"], auto_map=classes)
    own = ["own.OwnTokenizer", "own.OwnTokenizer"]
    change_json(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": own})
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    cache = str(tmp_path / "modules")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    monkeypatch.syspath_prepend(cache)
    return folder


@pytest.fixture
def own_mixture(base_folder, base_adapters, own_base, tmp_path):
    """A mixture whose config names that base."""
    folder = tmp_path / "mix"
    weft.from_adapters(base_folder, base_adapters).save_pretrained(folder)
    change_json(folder / "adapter_config.json", base_model_name_or_path=str(own_base))
    return folder


def change_json(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def commands(mixture, base, adapters, out):
    """Every command that loads a base model."""
    pairs = [f"{name}={path}" for name, path in adapters.items()]
    texts = out / "texts.jsonl"
    texts.write_text('{"text": "one two three four"}\n')
    data = ["--data", str(texts)]
    trained = ["--output", str(out / "trained"), "--max-steps", "1", "--sequence-length", "8"]
    experts = ["--experts-from", f"a={texts}", f"b={texts}", "--expert-steps", "1", "--expert-targets", "q_proj"]
    return {
        "generate": ["generate", str(mixture), "--prompt", "one"],
        "chat": ["chat", str(mixture)],
        "eval": ["eval", str(mixture), *data, "--rows", "base", "weft"],
        "inspect": ["inspect", str(mixture), "--text", "one two"],
        "fold": ["fold", str(mixture), "--output", str(out / "folded"), "--weights", "math=1"],
        "add-expert": ["add-expert", str(mixture), f"new={adapters['math']}"],
        "train": ["train", "--base", str(base), "--adapters", *pairs, *data, *trained],
        "train-further": ["train", "--start-from", str(mixture), *data, *trained],
        "train-experts": ["train", "--base", str(base), *experts, *trained],
    }


COMMANDS = ["generate", "chat", "eval", "inspect", "fold", "add-expert", "train", "train-further", "train-experts"]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_piped_in_does_not_allow_a_bases_code(
    name, own_mixture, own_base, base_adapters, marker, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\ny\n1\nhello\n"))
    arguments = commands(own_mixture, own_base, base_adapters, tmp_path)[name]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert f"base ({own_base}) needs code that it brings along" in errors
    assert "give --trust-remote-code" in errors
    assert not marker.exists()
    assert not (tmp_path / "trained").exists()


@pytest.mark.parametrize(
    "name", ["generate", "eval", "add-expert", "train", pytest.param("train-experts", marks=pytest.mark.slow)]
)
def test_an_option_allows_it(name, own_mixture, own_base, base_adapters, marker, tmp_path, capsys):
    arguments = commands(own_mixture, own_base, base_adapters, tmp_path)[name]
    assert main([*arguments, "--trust-remote-code"]) == 0, capsys.readouterr().err
    assert marker.exists()


def test_python_refuses_it_too_and_has_the_same_option(
    own_mixture, own_base, base_folder, base_adapters, marker, monkeypatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
    for load in (
        lambda: weft.from_pretrained(own_mixture),
        lambda: weft.from_adapters(own_base, base_adapters),
        lambda: weft.add_expert(own_mixture, "new", base_adapters["math"]),
    ):
        with pytest.raises(CheckpointError, match=REFUSED):
            load()
    assert not marker.exists()
    model = weft.from_pretrained(own_mixture, trust_remote_code=True)
    assert marker.exists()
    tokens = {"input_ids": torch.tensor([[1, 2, 3]])}
    torch.testing.assert_close(model(**tokens).logits, weft.from_pretrained(own_mixture, base_folder)(**tokens).logits)


def test_converting_runs_no_code_either(own_base, base_folder, base_adapters, marker, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
    weft.from_adapters(base_folder, base_adapters).save_pretrained(tmp_path / "mix")
    numbers = {"math": "0", "code": "1"}
    weft.convert_mixture(tmp_path / "mix", "peft", tmp_path / "for-peft", rename=numbers)
    with pytest.raises(CheckpointError, match=REFUSED):  # the order of its layers is the base's
        weft.convert_mixture(tmp_path / "for-peft", "weft", tmp_path / "back", base=own_base)
    assert not marker.exists()
    assert not (tmp_path / "back").exists()
    weft.convert_mixture(tmp_path / "for-peft", "weft", tmp_path / "back", base=own_base, trust_remote_code=True)
    assert marker.exists()


def test_every_load_of_a_base_says_whether_code_may_run():
    found = []
    for path in (ROOT / "src/weft").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = ast.unparse(node.func.value)
                if node.func.attr in ("from_pretrained", "from_config") and ("Auto" in owner or "kind" in owner):
                    found.append(path.name)
                    assert "trust" in ast.unparse(node), f"{path}, line {node.lineno}"
    assert len(found) >= 5

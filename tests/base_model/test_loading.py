"""Base models that are not whole are refused in one sentence, wherever they are loaded."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import weft
from weft.base_model.loading import load_base, load_tokenizer
from weft.cli import main
from weft.errors import CheckpointError

WEIGHTS = "model.safetensors"


@pytest.fixture
def base(base_folder, tmp_path):
    """A base model's folder, for a test to damage."""
    return shutil.copytree(base_folder, tmp_path / "damaged")


def truncate(folder):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def change_tensors(change):
    def damage(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def change_config(**values):
    def damage(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return damage


NORM = "model.norm.weight"
DAMAGES = {
    "truncated": (truncate, "."),
    "missing weights": (
        change_tensors(lambda tensors: tensors.pop(NORM)),
        f"its files lack {NORM}, which would be random numbers: copy it again",
    ),
    "another shape": (
        change_tensors(lambda tensors: tensors.update({NORM: torch.ones(31)})),
        rf"{NORM} has shape \[31\], expected \[32\]: its config.json and its weights do not belong together",
    ),
    "wider than its weights": (change_config(hidden_size=64), r"has shape \[.*\], expected \[.*\], .* and \d+ more"),
    "deeper than its weights": (
        change_config(num_hidden_layers=3),
        r"its files lack model.layers.2.*, .* and \d+ more",
    ),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "."),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "."),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "."),
    "config of other types": (change_config(hidden_size="32"), "."),
    "weights in a folder": (lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), "."),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_base_that_is_not_whole_is_refused(damage, message, base, base_adapters):
    damage(base)
    # What transformers does not refuse by itself, it warns of.
    message = rf"base \({base}\) cannot be loaded: .*{message}"
    with pytest.raises(CheckpointError, match=message):
        load_base(str(base), "auto")
    with pytest.raises(CheckpointError, match=message):
        weft.from_adapters(str(base), base_adapters)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 5}', ""])
def test_a_broken_tokenizer_is_refused(content, base):
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(
        CheckpointError, match=rf"base \({base}\) cannot be loaded: .*Expected a model with a tokenizer"
    ):
        load_tokenizer(str(base))


def test_tied_weights_are_not_missing(base, base_adapters):
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    assert "lm_head.weight" not in load_file(base / WEIGHTS)
    assert weft.from_adapters(str(base), base_adapters).xlora_config.num_experts == 2


@pytest.mark.parametrize(
    "command",
    ["generate {} --prompt a", "eval {} --data data.txt", "inspect {} --text a", "fold {} --weights math=1 code=0"],
)
def test_commands_say_so_in_a_line(command, mixture, base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.txt").write_text("one two three")
    truncate(base)
    extra = ["--output", "folded"] if command.startswith("fold") else []
    assert main([*command.format(mixture).split(), "--base", str(base), *extra]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"weft {command.split()[0]}: error: base ({base}) cannot be loaded: ")
    assert "Traceback" not in error


def test_an_adapter_or_a_mixture_in_the_place_of_a_base_is_named(base_folder, base_adapters, mixture, capsys):
    made_for = rf"not a base model: give the one that it is made for \('{base_folder}'\)"
    adapter = base_adapters["math"]
    for load in (
        lambda name: load_base(name, "auto"),
        load_tokenizer,
        lambda name: weft.from_adapters(name, base_adapters),
        lambda name: weft.from_pretrained(mixture, name),
    ):
        with pytest.raises(CheckpointError, match=rf"base \({adapter}\) is an adapter, {made_for}"):
            load(adapter)
        with pytest.raises(CheckpointError, match=rf"base \({mixture}\) is a mixture, {made_for}"):
            load(mixture)
    assert main(["generate", mixture, "--base", adapter, "--prompt", "x"]) == 1
    assert f"weft generate: error: base ({adapter}) is an adapter, not a base model" in capsys.readouterr().err

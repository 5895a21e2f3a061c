"""The files of examples/configs run as they stand, in a folder like the tutorial's, and say nothing that is not so."""

import json
import re
import shutil
from pathlib import Path

import pytest

import weft
from weft.cli import main
from weft.cli.commands import COMMANDS
from weft.cli.parser import parse
from weft.options.described import options_of

CONFIGS = sorted((Path(__file__).parents[2] / "examples/configs").glob("*.yaml"))
# What a tiny model needs otherwise.
SMALLER = {
    "train": ["--max-steps", "2"],
    "experts_first": ["--max-steps", "2", "--expert-steps", "1"],
    "large_model": ["--max-tokens", "400", "--gate-layer", "1"],
    "labels": ["--max-steps", "2"],
    "long_run": ["--max-steps", "4", "--eval-steps", "2"],
}


@pytest.fixture
def workplace(base_folder, base_adapters, tmp_path, monkeypatch):
    """A folder with the paths that the files name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    Path("my-model").symlink_to(base_folder)
    Path("adapters").mkdir()
    for name, path in zip(("code", "law"), base_adapters.values(), strict=True):
        Path("adapters", name).symlink_to(path)
    for folder in ("data", "heldout"):
        Path(folder).mkdir()
        for name in ("code", "law", "mixed"):
            rows = [{"text": f"{name} of {folder}, number {number}: so it is. "} for number in range(4)]
            if name == "mixed":
                rows = [{**row, "experts": [[0, "code"], [9, "law"]]} for row in rows]
            Path(folder, f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def command_of(config):
    return "eval" if config.stem == "eval" else "train"


def config_named(name):
    return next(str(config) for config in CONFIGS if config.stem == name)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.stem)
def test_every_option_is_one_and_stands_below_a_comment(config):
    text = config.read_text()
    names = {option.name for option in options_of(COMMANDS[command_of(config)].options)}
    keys = re.findall(r"^(\w+):", text, flags=re.M)
    assert keys
    assert set(keys) <= names
    for paragraph in text.strip().split("\n\n"):
        assert paragraph.startswith("# "), paragraph
    for name in re.findall(r"`(\w+)[`:]", text):  # in comments
        assert name in names, name
    assert f"weft {command_of(config)} " in text
    words = [] if command_of(config) == "train" else ["my-mixture"]
    assert parse(command_of(config), [*words, "--config", str(config)]).problems == []


@pytest.mark.parametrize("name", SMALLER)
def test_a_training_runs(name, workplace, capfd):
    assert main(["train", "--config", config_named(name), *SMALLER[name]]) == 0, capfd.readouterr().err
    assert weft.from_pretrained("my-mixture").xlora_config.expert_names == ["code", "law"]
    if name == "experts_first":
        assert Path("my-mixture-experts/code/adapter_config.json").exists()
    if name == "long_run":
        assert list(Path("my-mixture").rglob("events.out.tfevents*"))


def test_a_training_that_was_stopped_goes_on(workplace, capfd):
    command = ["train", "--config", config_named("long_run"), *SMALLER["long_run"]]
    assert main(command) == 0
    checkpoints = Path("my-mixture/checkpoints")
    shutil.rmtree(checkpoints / "checkpoint-4")
    assert main([*command, "--resume"]) == 0, capfd.readouterr().err
    assert (checkpoints / "checkpoint-4").is_dir()


def test_an_evaluation_runs(workplace, base_folder, capfd):
    adapters = {"code": "adapters/code", "law": "adapters/law"}
    weft.from_adapters(str(base_folder), adapters).save_pretrained("my-mixture")
    assert main(["eval", "my-mixture", "--config", config_named("eval")]) == 0, capfd.readouterr().err
    rows = json.loads(Path("my-mixture/eval.json").read_text())["perplexity"]
    assert {"base", "only code", "merge ties", "weft", "oracle"} <= set(rows)
    assert Path("table.md").exists()
    assert Path("table.csv").exists()

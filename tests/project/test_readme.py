"""What the README tells a newcomer to type works."""

import io
import json
import re
import shlex
from pathlib import Path

import pytest

import weft
from weft.cli import main

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture
def named(base_folder, base_adapters, tmp_path, monkeypatch):
    """A folder in which the README's names exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-model").symlink_to(base_folder)
    (tmp_path / "adapters").mkdir()
    for name, path in zip(("code", "law"), base_adapters.values(), strict=True):
        (tmp_path / "adapters" / name).symlink_to(path)
    (tmp_path / "heldout").mkdir()
    for file in ("mixed.jsonl", "heldout/code.jsonl", "heldout/law.jsonl", "heldout/mixed.jsonl"):
        (tmp_path / file).write_text(json.dumps({"text": "the contract says " * 3}))
    return tmp_path


def test_the_commands_of_the_readme_run(named, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    commands = re.findall(r"^weft .*$", README, flags=re.M)
    assert [command.split()[1] for command in commands] == ["train", "eval", "generate", "chat", "fold"]
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert "The contract says" in capsys.readouterr().out


def test_the_python_of_the_readme_runs(named):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names: dict = {"weft": weft}
    try:
        for block in blocks:
            exec(block, names)
    finally:
        weft.unregister_from_peft()
    assert names["model"].xlora_config.expert_names == ["code", "law"]


def test_the_two_first_commands_are_targets_of_the_makefile():
    first = re.search(r"```\n(.*?)```", README, flags=re.S).group(1)
    targets = re.findall(r"^make (\w+)", first, flags=re.M)
    assert targets == ["demo", "test"]
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert all(re.search(rf"^{target}: ", makefile, flags=re.M) for target in targets)


def test_the_table_is_that_of_the_results_it_names():
    results = Path(__file__).parents[2] / re.search(r"\((benchmarks/results/[\d-]+demo.json)\)", README).group(1)
    found = json.loads(results.read_text())["perplexity"]
    table = re.search(r"^\| perplexity.*?\n\n", README, flags=re.M | re.S).group(0)
    head, _, *lines = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.split("\n")[:-2]]
    assert head[1:] == list(found["base"])
    assert all(set(row.split()) <= set(re.findall(r"\w+", line[0])) for row, line in zip(found, lines, strict=True))
    assert [line[1:] for line in lines] == [[f"{value:.2f}" for value in row.values()] for row in found.values()]

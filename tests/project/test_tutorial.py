"""The tutorial runs from its first block to its last, as it stands."""

import json
import re
import shlex
from pathlib import Path

import pytest

from models import quietly
from weft.cli import main

TUTORIAL = (Path(__file__).parents[2] / "docs/tutorial.md").read_text()
BLOCKS = re.findall(r"^```(python|shell)\n(.*?)^```$", TUTORIAL, flags=re.M | re.S)


@pytest.fixture
def workplace(base_folder, base_adapters, tmp_path, monkeypatch):
    """A folder with what the tutorial says one needs, and nothing else."""
    monkeypatch.chdir(tmp_path)
    Path("my-model").symlink_to(base_folder)
    for folder in ("adapters", "data", "heldout"):
        Path(folder).mkdir()
    for name, path in zip(("code", "law"), base_adapters.values(), strict=True):
        Path("adapters", name).symlink_to(path)
        for folder in ("data", "heldout"):
            rows = [{"text": f"{name} of {folder}, number {number}: so it is written. " * 8} for number in range(4)]
            Path(folder, f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_tutorial_runs(workplace, hub, capsys):
    names = {}
    for kind, block in BLOCKS:
        if kind == "python":
            quietly(exec, block, names)
            continue
        for command in block.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "weft"
            assert main(arguments) == 0, f"{command}\n{capsys.readouterr().err}"
    assert Path("gates.html").exists()
    assert "better than weft" in Path("table.md").read_text()
    assert "perplexity" in Path("pulled/README.md").read_text()


def test_it_shows_every_step_in_order():
    shell = "".join(block for kind, block in BLOCKS if kind == "shell")
    commands = re.findall(r"^weft ([\w-]+)", shell, flags=re.M)
    assert commands == ["train", "eval", "inspect", "generate", "fold", "push", "pull"]

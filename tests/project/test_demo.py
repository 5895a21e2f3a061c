"""The demo runs from nothing to a generated text, a second run reuses what is done, and its experts are real ones."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from models import quietly
from weft.screen.countdown import Countdown

ROOT = Path(__file__).parents[2]
DOMAINS = ["python", "reference", "licences", "records"]


@pytest.fixture
def demo(monkeypatch):
    """Imports a module of the demo."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if (ROOT / "demo" / f"{name}.py").exists():
            del sys.modules[name]


@pytest.mark.slow
def test_demo_runs_and_runs_again(tmp_path):
    command = [sys.executable, str(ROOT / "demo/run.py"), "--quick", "--work-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((tmp_path / "quick/eval.json").read_text())["perplexity"]
    assert list(rows) == ["base", *(f"only {name}" for name in DOMAINS), "uniform mix", "weft", "oracle"]
    assert set(rows["weft"]) == set(rows["oracle"]) == {*DOMAINS, "mixed"}
    for number, stage in enumerate(["model", "domains", "experts", "train", "eval", "generate"], start=1):
        assert f"[{number}/6] {stage}: " in first.stdout
    assert first.stdout.count("experts:  python") == 4  # the legend and the shares of both texts
    # What the fit by labels needs, which a quick run does not fit by.
    mixed = [json.loads(line) for line in (tmp_path / "data/train/mixed.jsonl").read_text().splitlines()]
    assert all({name for _, name in row["experts"]} <= set(DOMAINS) for row in mixed)
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0
    assert "weft train" not in again.stdout
    assert "weft generate" in again.stdout
    shutil.rmtree(tmp_path / "quick/mixture")
    (tmp_path / "quick/experts/python/adapter_config.json").unlink()
    broken = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert broken.returncode == 1
    assert "weft train: error: " in broken.stderr
    assert "[5/6]" not in broken.stdout


def test_it_says_what_it_will_do_before_anything_heavy_is_imported():
    code = "import sys; import run; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT / "demo")
    assert shown.stdout == "[]\n"


def test_a_run_is_full_or_quick(demo, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--full", "--quick"])
    with pytest.raises(SystemExit):
        demo("run").main()
    assert "argument --quick: not allowed with argument --full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx512_f": True, "amx_bf16": False}, False)],
)
def test_bfloat16_is_for_processors_with_instructions_for_it(demo, monkeypatch, capabilities, fast):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert demo("experts").fast_bfloat16() is fast


@pytest.fixture
def texts(tmp_path):
    """A folder with texts of two domains."""
    for name in ("fox", "law"):
        rows = [{"text": f"the {name} number {number} " * 40} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_share_a_base_model_and_each_is_what_it_is_alone(demo, base_folder, texts, dtype):
    recipe = demo("recipes").ExpertRecipe(steps=2, batch_size=1, learning_rate=1e-2, first_layer=1)
    ensure = demo("experts").ensure_experts
    quietly(ensure, texts / "both", base_folder, texts, ["fox", "law"], recipe, dtype)
    for name in ("fox", "law"):
        quietly(ensure, texts / "alone", base_folder, texts, [name], recipe, dtype)
        one, other = (load_file(texts / kind / name / "adapter_model.safetensors") for kind in ("both", "alone"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert all(value.dtype == torch.float32 for value in one.values())
        assert {key.split(".layers.")[1].split(".")[0] for key in one} == {"1"}
        assert any(value.abs().sum() > 0 for key, value in one.items() if "lora_B" in key)


def test_a_trained_expert_leaves_the_base_model_as_it_was(demo, base_folder, texts, capsys):
    experts = demo("experts")
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    recipe = demo("recipes").ExpertRecipe(steps=2, batch_size=2, learning_rate=1e-2)
    sequences = experts.read_sequences(texts / "fox.jsonl", base_folder)
    with Countdown(2) as countdown:
        quietly(experts.train_expert, base, sequences, texts / "fox", recipe, countdown)
    assert countdown.done == 2
    assert countdown.what.startswith("expert fox        step  2/2  loss ")
    after = base.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)

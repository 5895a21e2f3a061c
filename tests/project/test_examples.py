"""The examples run as they stand, and train."""

import importlib.util
import json
from pathlib import Path

import pytest

import weft
from models import quietly

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(base_folder, base_adapters, tmp_path, monkeypatch):
    """Run the main function of an example with few steps."""
    data = tmp_path / "mixed.jsonl"
    experts = [*base_adapters, None]
    rows = [{"text": f"the quick brown fox {i} " * 2, "expert": experts[i % 3]} for i in range(20)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def main(name, *options):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        arguments = ["--base", str(base_folder), "--data", str(data), "--output", str(tmp_path / "out"), *options]
        found = quietly(module.main, [*arguments, "--adapters", *(f"{n}={path}" for n, path in base_adapters.items())])
        assert weft.from_pretrained(tmp_path / "out").xlora_config.expert_names == list(base_adapters)
        return found

    return main


def losses_in(log):
    return {"gate/balance_loss", "gate/expert_label_loss", "gate/share/math", "gate/entropy", "loss"} <= set(log)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_the_loop(run, capsys):
    run("train_with_a_loop", "--steps", "6", "--log-steps", "3")
    logs = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [log["step"] for log in logs] == [3, 6]
    assert all(losses_in(log) for log in logs)


def test_the_trainer_evaluates_reports_and_loads_the_best(run, tmp_path):
    trainer = run("train_with_trainer", "--steps", "10", "--eval-steps", "5")
    assert losses_in(trainer.state.log_history[1])
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [5, 10]
    assert list((tmp_path / "out/checkpoints").rglob("events.out.tfevents*"))
    assert trainer.state.best_model_checkpoint is not None


def test_trl(run):
    trainer = run("train_with_trl", "--steps", "10")
    assert losses_in(trainer.state.log_history[0])
    assert "mean_token_accuracy" in trainer.state.log_history[0]


def test_preferences_with_trl(mixture, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"question {i} ", "chosen": f"yes {i}", "rejected": "no"} for i in range(8)]
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, rows)))
    spec = importlib.util.spec_from_file_location("prefer_with_trl", EXAMPLES / "prefer_with_trl.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    paths = {"--mixture": mixture, "--data": str(tmp_path / "preferences.jsonl"), "--output": str(tmp_path / "out")}
    trainer = quietly(module.main, [*(part for pair in paths.items() for part in pair), "--steps", "10"])
    assert "rewards/margins" in trainer.state.log_history[0]
    weft.from_pretrained(tmp_path / "out")

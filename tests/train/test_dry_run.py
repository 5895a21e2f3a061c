"""`weft train --dry-run`, and the estimate that a training begins with."""

import re
import time

import pytest

from models import folder_files
from weft.cli import main
from weft.train.progress import ProgressLine

NUMBER = r"[\d.]+ (kB|MB|GB)"
STEP = r"dry run of {}, nothing is written: a step on the longest batch \(4 x 32 tokens\) takes [\d.e-]+ s"
MEMORY = rf"  memory: {NUMBER} at the peak; parameters {NUMBER}, of which {NUMBER} are trained; optimizer {NUMBER}"


@pytest.fixture
def dry(options, tmp_path):
    """`weft train --dry-run` with further options; they come without a folder that is not there."""
    return lambda *more: main([*options("out", 1, "--dry-run", "--xlora-size", "8"), *more])


def test_a_dry_run_says_what_training_needs_and_writes_nothing(dry, data, tmp_path, capsys):
    before = folder_files(tmp_path)
    assert dry("--eval-data", str(data), "--eval-steps", "1", "--cache-scaling-pass") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(STEP.format("the gate"), lines[0]), lines
    assert re.fullmatch(MEMORY, lines[1]), lines
    # 21 rows, of which a step takes 8, twice.
    assert re.fullmatch(
        r"  time: about [\d.]+ (s|min) for 4 steps of [\d.e-]+ s, and [\d.]+ (s|min) for 4 evaluations; less with the "
        "cache of the scaling pass, which was not used",
        lines[2],
    ), lines
    assert len(lines) == 3
    assert folder_files(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--packing"], ["--group-by-length"], ["--gradient-checkpointing"]], ids=str)
def test_a_dry_run_trains_as_the_training_would(dry, more, tmp_path, capsys):
    assert dry(*more) == 0
    assert "dry run of the gate" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_dry_run_finds_what_a_training_would(dry, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/todo.txt").write_text("mine")
    assert dry("--top-k-lora", "3") == 1
    error = capsys.readouterr().err
    assert "top_k_lora (3) must be between 1 and the number of adapters (2)" in error
    assert f"output ({tmp_path}/out) exists already and holds todo.txt" in error
    assert folder_files(tmp_path / "out") == ["todo.txt"]


def test_a_dry_run_of_experts_that_are_still_to_be_trained(base_folder, base_adapters, data, tmp_path, capsys):
    before = folder_files(tmp_path)
    experts = ["--experts-from", f"fox={data}", f"owl={data}", "--adapters", f"math={base_adapters['math']}"]
    more = [
        "--output",
        str(tmp_path / "out"),
        "--sequence-length",
        "32",
        "--expert-rank",
        "2",
        "--max-steps",
        "4",
        "--dry-run",
    ]
    assert main(["train", "--base", str(base_folder), *experts, *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith("  ")]
    for line, what in zip(heads, ("expert 'fox'", "expert 'owl'", "the gate"), strict=True):
        assert re.fullmatch(STEP.format(re.escape(what)), line), lines
    assert folder_files(tmp_path) == before


def test_a_training_begins_with_an_estimate(options, capsys):
    assert main(options("out", 1, "--logging-steps", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("step "))
    assert re.fullmatch(rf"about [\d.]+ (s|min); {NUMBER} of memory", lines[first - 1]), lines
    assert sum(line.startswith("about ") for line in lines) == 1


def test_an_estimate_leaves_the_first_step_out(monkeypatch, capsys):
    """The first step takes 50 s, the others 10 s: 100 of them take 50 s + 99 x 10 s."""
    from transformers import TrainerState, TrainingArguments

    line, state = ProgressLine(), TrainerState(max_steps=100)
    args, times = TrainingArguments(use_cpu=True), iter([0.0, 50.0, 60.0, 70.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    line.on_train_begin(args, state, None)
    for state.global_step in (1, 2, 3):
        line.on_step_end(args, state, None)
    assert re.fullmatch(rf"about 17 min; {NUMBER} of memory\n", capsys.readouterr().out)

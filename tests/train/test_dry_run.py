"""`weft train --dry-run`, and the estimate that a training begins with."""

import re
import time

import pytest
from transformers import TrainerState, TrainingArguments

from models import folder_files
from weft.cli import main
from weft.options import TrainOptions
from weft.train.plateau import Plan, evaluation_in_steps
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
        r"  time: about [\d.]+ (s|min) for 4 steps of [\d.e-]+ s, and [\d.]+ (s|min) for 5 evaluations; less with the "
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


def estimates(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("about ", "at most "))]


def test_a_training_begins_with_an_estimate(options, capsys):
    for steps in ("1", "2"):
        assert main(options(steps, 1, "--logging-steps", steps)) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("step "))
        assert re.fullmatch(rf"about [\d.]+ (s|min); {NUMBER} of memory", lines[first - 1]), lines
        assert sum(line.startswith("about ") for line in lines) == 1


def test_short_and_resumed_trainings_have_an_estimate_too_but_not_with_quiet(options, data, capsys):
    assert main(options("one", 1, "--max-steps", "1")) == 0
    assert estimates(capsys) == []  # it is over
    assert main(options("two", 1, "--max-steps", "2", "--eval-data", str(data), "--eval-steps", "1")) == 0
    (line,) = estimates(capsys)
    assert re.fullmatch(rf"about [\d.]+ s with evaluations; {NUMBER} of memory", line)
    assert main(options("two", 1, "--max-steps", "4", "--resume", "true")) == 0
    assert len(estimates(capsys)) == 1
    assert main(options("two", 1, "--max-steps", "6", "--resume", "true", "--quiet")) == 0
    assert estimates(capsys) == []


@pytest.mark.parametrize(
    ("first", "others", "number", "evaluating", "said"),
    [
        # The first of 100 steps includes the set-up: 9 s + 99 x 1 s.
        (9.0, 1.0, 2, 0.0, "about 2 min"),
        # A step that takes so long is hardly set-up: 100 x 20 s.
        (20.0, 10.0, 1, 0.0, "about 33 min"),
        # 98 of the steps, and as long again for evaluations: 2 s + 2 x 98 s.
        (1.0, 1.0, 2, 1.0, "about 3 min with evaluations"),
    ],
)
def test_an_estimate_is_made_from_one_step(first, others, number, evaluating, said, monkeypatch, capsys):
    line, state = ProgressLine(evaluating=evaluating), TrainerState(max_steps=100)
    args, now = TrainingArguments(use_cpu=True), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line.on_train_begin(args, state, None)
    shown = []
    for step in (1, 2, 3):
        line.on_step_begin(args, state, None)
        now[0] += first if step == 1 else others
        state.global_step = step
        line.on_step_end(args, state, None)
        shown.append(capsys.readouterr().out)
    assert [bool(text) for text in shown] == [step == number for step in (1, 2, 3)]
    assert re.fullmatch(rf"{said}; {NUMBER} of memory\n", shown[number - 1])


def test_an_evaluation_before_the_first_step_is_no_part_of_the_speed(monkeypatch, capsys):
    line, state = ProgressLine(), TrainerState(max_steps=2)
    args, now = TrainingArguments(use_cpu=True), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line.on_train_begin(args, state, None)
    now[0] = 60.0
    line.on_evaluate(args, state, None)
    line.on_step_begin(args, state, None)
    now[0], state.global_step, state.num_input_tokens_seen = 62.0, 1, 100
    line.on_step_end(args, state, None)
    line.on_log(args, state, None, logs={"loss": 2.0})
    assert "50 tokens/s  0:00:02 left" in capsys.readouterr().out


def test_an_evaluation_is_estimated_from_its_tokens():
    rows, held_out = [{"input_ids": [1] * 10}] * 8, [{"input_ids": [1] * 20}] * 2
    # A step reads 4 x 10 tokens, an evaluation 2 x 20, and takes half as long.
    planned = Plan(TrainOptions(batch_size=2, gradient_accumulation_steps=2), rows, held_out)
    assert evaluation_in_steps(planned) == 0.5
    packed = TrainOptions(batch_size=1, packing=True, sequence_length=20)
    assert evaluation_in_steps(planned._replace(options=packed)) == 1.0

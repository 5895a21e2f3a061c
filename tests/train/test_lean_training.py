"""`weft train` with the scaling pass from disk, packed or grouped batches and a token budget; what it shows."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import weft
from weft.cli import main
from weft.train.arguments import budget_in_steps
from weft.train.progress import ProgressLine

LINE = (
    r"step \d+/\d+  loss \d+\.\d{4}  learning_rate [\d.e-]+  [\d,]+ tokens/s  \d+:\d\d:\d\d left  math \d+%  code \d+%"
)


@pytest.fixture
def arguments(base_folder, base_adapters, tmp_path):
    """`weft train` with few steps, as a list to add to."""
    rows = [{"text": f"the quick brown fox {number} " * 4} for number in range(12)]
    rows.append({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]})
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]
    return [
        *("train", "--base", str(base_folder), "--adapters", *adapters, "--data", str(data)),
        *("--output", str(tmp_path / "out"), "--max-steps", "4", "--batch-size", "2", "--sequence-length", "16"),
    ]


def gate(folder):
    return weft.from_pretrained(folder).internal_xlora_classifier.state_dict()


@pytest.fixture
def run(arguments, tmp_path):
    """Trains with more options; gives the gate and the last checkpoint's state."""

    def train(name, *options):
        command = list(arguments)
        command[command.index("--output") + 1] = str(tmp_path / name)
        steps = command.index("--max-steps")
        if "--max-tokens" in options:
            del command[steps : steps + 2]
        assert main([*command, "--logging-steps", "1", *options]) == 0
        checkpoints = list((tmp_path / name / "checkpoints").glob("checkpoint-*/trainer_state.json"))
        last = max(checkpoints, key=lambda path: int(path.parent.name.rpartition("-")[2]))
        return gate(tmp_path / name), json.loads(last.read_text())

    return train


def losses(state):
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--gradient-accumulation-steps", "2", "--max-steps", "8"], marks=pytest.mark.slow),
        pytest.param(["--packing", "--sequence-length", "64", "--gradient-checkpointing"], marks=pytest.mark.slow),
        ["--group-by-length", "--scaling-pass-layers", "1", "--use-trainable-adapters"],
    ],
    ids=" ".join,
)
def test_training_from_the_cache_is_training_without(run, tmp_path, capsys, options):
    plain, plain_state = run("plain", *options)
    capsys.readouterr()
    cached, cached_state = run("cached", "--cache-scaling-pass", *options)
    assert "scaling pass: " in capsys.readouterr().out
    assert losses(cached_state) == pytest.approx(losses(plain_state), abs=1e-6)
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=1e-5, rtol=1e-5)  # Adam divides by tiny gradients


@pytest.mark.parametrize("options", [["--cache-scaling-pass"], ["--packing"], ["--group-by-length"]], ids=" ".join)
def test_a_resumed_run_of_these_ends_where_an_unbroken_one_does(arguments, tmp_path, options):
    import shutil

    arguments += ["--save-steps", "2", *options]
    assert main(arguments) == 0
    whole = gate(tmp_path / "out")
    state = json.loads((tmp_path / "out/checkpoints/checkpoint-4/trainer_state.json").read_text())
    shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-4")
    assert main([*arguments, "--resume", "true"]) == 0
    resumed = gate(tmp_path / "out")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    again = json.loads((tmp_path / "out/checkpoints/checkpoint-4/trainer_state.json").read_text())
    assert again["num_input_tokens_seen"] == state["num_input_tokens_seen"] > 0


def test_packing_takes_fewer_steps_an_epoch_for_the_same_tokens(run):
    options = ["--sequence-length", "256", "--max-steps", "0"]
    _, plain = run("plain", *options)
    _, packed = run("packed", "--packing", *options)
    assert packed["global_step"] < plain["global_step"]
    assert packed["num_input_tokens_seen"] == plain["num_input_tokens_seen"]


def test_a_token_budget_ends_the_training_with_the_step_that_reaches_it(run):
    _, state = run("out", "--max-tokens", "1000", "--learning-rate", "0.01", "--packing")
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert 1000 <= state["num_input_tokens_seen"] < 1000 + 2 * 16
    assert state["global_step"] == len(steps) < state["max_steps"]
    assert steps[-1]["learning_rate"] < 0.02 * max(step["learning_rate"] for step in steps)


def test_steps_and_tokens_may_both_be_limited(run):
    assert run("steps", "--max-tokens", "1000", "--max-steps", "3")[1]["global_step"] == 3
    assert run("tokens", "--max-tokens", "60", "--max-steps", "30")[1]["global_step"] < 5


@pytest.mark.parametrize(
    ("budget", "expected", "most"), [(1000, 10, 10), (1500, 15, 20), (1, 1, 10), (2001, 21, 30)], ids=str
)
def test_a_budget_is_so_many_steps(budget, expected, most):
    assert budget_in_steps(budget, tokens_per_epoch=1000, steps_per_epoch=10) == (expected, most)


def test_the_screen_shows_a_line_per_log_step_and_a_summary(run, capsys):
    _, state = run("out")
    lines = capsys.readouterr().out.splitlines()
    assert sum(re.fullmatch(LINE, line) is not None for line in lines) == 4
    first, last = losses(state)[0], losses(state)[-1]
    summary = rf"trained to step 4: {state['num_input_tokens_seen']:,} tokens in 0:\d\d:\d\d, [\d,]+ tokens/s, loss "
    assert re.search(summary + rf"{first:.4f} -> {last:.4f}", "\n".join(lines))


def test_on_a_terminal_a_bar_moves_below_the_lines(monkeypatch):
    import io

    import rich.console
    import transformers

    screen = io.StringIO()
    progress = ProgressLine(max_tokens=100)
    progress.console = rich.console.Console(file=screen, force_terminal=True, width=100)
    args = transformers.TrainingArguments("unused")
    state, control = transformers.TrainerState(max_steps=8), transformers.TrainerControl()
    progress.on_train_begin(args, state, control)
    state.global_step, state.num_input_tokens_seen = 2, 50
    progress.on_step_end(args, state, control)
    progress.on_log(args, state, control, logs={"loss": 2.5, "epoch": 0.1, "balance": 0.25})
    progress.on_log(args, state, control, logs={"train_runtime": 1.0})
    progress.on_train_end(args, state, control)
    progress.close()
    shown = screen.getvalue()
    assert "step 2/8  loss 2.5000  balance 0.25  " in shown
    assert "━" in shown
    assert "trained to step 2: 50 tokens in 0:00:00" in shown


@pytest.mark.parametrize(("width", "lines"), [(100, 2), (80, 2), (50, 4)])
def test_a_log_line_breaks_between_its_parts_where_a_terminal_is_too_narrow(width, lines):
    import io
    import time

    import rich.console
    import transformers

    screen = io.StringIO()
    progress = ProgressLine()
    progress.console = rich.console.Console(file=screen, force_terminal=True, width=width)
    progress._start = progress._last = (time.monotonic() - 60, 0, 0.0)
    shares = {"gate/share/python": 0.1, "gate/share/reference": 0.2, "gate/share/licences": 0.3, "gate/share/mine": 0.4}
    logs = {"loss": 2.5, "learning_rate": 9.755e-05, "gate/entropy": 0.5, **shares}
    state = transformers.TrainerState(max_steps=1000, global_step=100, num_input_tokens_seen=5)
    progress._estimated = True
    progress.on_log(None, state, transformers.TrainerControl(), logs=logs)
    shown = screen.getvalue().splitlines()
    assert all(len(line) <= width for line in shown)
    assert len(shown) == lines
    assert shown[0].startswith("step 100/1000  loss 2.5000")
    assert ("learning_rate 9.755e-05" in shown[0]) == (width == 100)
    assert all(line.startswith("  ") for line in shown[1:])
    rest = "  ".join(line.strip() for line in shown[1:])
    assert rest.endswith("python 10%  reference 20%  licences 30%  mine 40%")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packing", "--group-by-length"], r"packing \(True\) and group_by_length \(True\) exclude each other"),
        (["--max-tokens", "-1"], r"max_tokens \(-1\) must be at least 0"),
        (["--cache-scaling-pass", "--gate-layer", "1"], r"gate_layer \(1\) must be None: with it there is no scaling"),
        (["--cache-scaling-pass", "--scaling-pass-value", "0.5"], r"scaling_pass_value \(0\.5\) must be 0"),
    ],
    ids=str,
)
def test_what_cannot_work_together_is_refused(arguments, options, message, capsys, tmp_path):
    assert main([*arguments, *options]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_runs_share_a_cache_and_a_mixture_loads_with_one_beside_it(run, tmp_path, capsys):
    run("out", "--cache-scaling-pass")
    assert weft.from_pretrained(tmp_path / "out").xlora_config.num_experts == 2
    capsys.readouterr()
    run("again", "--cache-scaling-pass", "--cache-folder", str(tmp_path / "out/scaling-cache"))
    assert re.search(r"scaling pass: .*, found\n", capsys.readouterr().out)
    assert not (tmp_path / "again/scaling-cache").exists()


@pytest.mark.parametrize("experts", [3, 8, 9, 32])
def test_a_log_line_names_the_shares_of_at_most_eight_experts(experts, capsys):
    logs = {"loss": 2.0} | {f"gate/share/e{number}": (number + 1) / 1000 for number in range(experts)}
    state = SimpleNamespace(is_world_process_zero=True, global_step=5, max_steps=10, num_input_tokens_seen=10)
    line = ProgressLine()
    line._estimated = True
    line.on_log(None, state, None, logs=logs)
    shown = capsys.readouterr().out
    if experts <= 8:
        assert [f"e{number} " in shown for number in range(experts)] == [True] * experts
        assert "others" not in shown
    else:
        named = range(experts - 1, experts - 8, -1)
        places = [shown.index(f"e{number} ") for number in named]
        assert places == sorted(places)
        rest = sum((number + 1) / 1000 for number in range(experts - 7))
        assert f"{experts - 7} others {rest:.0%}" in shown

"""A training without a number of steps: it ends at a plateau, and held-out texts choose rate and weight."""

import json
import math
import shutil
from types import SimpleNamespace

import pytest

import weft
from weft.cli import main
from weft.evaluate import perplexity
from weft.model.model import at_own_weight
from weft.options import TrainOptions
from weft.train import weight_search
from weft.train.comparison import comparison
from weft.train.held_out import digest_of, some_of, split
from weft.train.plateau import failures, interval_of, plan
from weft.train.weight_search import WeightSearch


@pytest.fixture
def texts(tmp_path):
    """60 texts, of which 6 are held out."""
    file = tmp_path / "texts.jsonl"
    words = ["the quick brown fox", "over the lazy dog", "a mathematician proves it", "code that nobody reads"]
    file.write_text("\n".join(json.dumps({"text": f"{words[number % 4]} {number}"}) for number in range(60)))
    return str(file)


@pytest.fixture
def command(base_folder, base_adapters, texts, tmp_path):
    def build(name, *more):
        return [
            *(
                "train",
                "--base",
                str(base_folder),
                "--adapters",
                *(f"{name}={path}" for name, path in base_adapters.items()),
            ),
            *("--data", texts, "--output", str(tmp_path / name), "--batch-size", "6", "--sequence-length", "32"),
            *("--gate-start", "random", *more),
        ]

    return build


def log_of(folder):
    last = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    return last, json.loads((last / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([], 0),
        ([3.0], 0),
        ([3.0, 2.9, 2.8], 0),
        ([3.0, 2.9985], 1),  # 0.05%
        ([3.0, 3.1, 2.9, 2.9, 2.95, 2.8], 3),
        ([math.nan, 3.0], 1),
        ([2.0, math.nan, math.inf, 1.0], 2),
        ([math.nan, 3.0, 2.0, 1.0, 0.5], 1),
    ],
)
def test_an_evaluation_fails_if_its_loss_is_not_clearly_the_lowest(losses, expected):
    assert failures(losses) == expected


def test_a_tenth_is_held_out_and_the_rest_is_trained_on():
    rows = [{"input_ids": [number], "labels": [number]} for number in range(1000)]
    rest, held_out = split(rows, seed=0)
    assert len(held_out) == 64
    assert sorted(row["input_ids"][0] for row in rest + held_out) == list(range(1000))
    assert split(rows, seed=0)[1] == held_out
    assert split(rows, seed=1)[1] != held_out
    assert len(split(rows[:40], seed=0)[1]) == 4
    assert split(rows[:39], seed=0) == (rows[:39], None)


def test_texts_are_held_out_as_a_whole():
    rows = [{"input_ids": [number], "labels": [number], "place": number // 3} for number in range(300)]
    rest, held_out = split(rows, seed=0)
    assert len(held_out) == 30
    assert not {row["place"] for row in held_out} & {row["place"] for row in rest}
    # Texts of another length than the others' are held out, too.
    texts = [[number] * (1 + number % 7) for number in range(100)]
    rows = [{"input_ids": [n], "labels": [n], "place": n} for text in texts for n in text]
    held_out = split(rows, seed=0)[1]
    assert len(held_out) >= 35
    assert len({row["place"] % 7 for row in held_out}) >= 5


@pytest.mark.parametrize("windows", [10, 100])
def test_few_texts_and_long_ones_are_held_out_in_part(windows):
    # 39 texts; and texts of which none has at most 64 sequences.
    number = 39 if windows == 10 else 60
    rows = [{"input_ids": [n], "labels": [n], "place": n // windows} for n in range(number * windows)]
    assert len(split(rows, seed=0)[1]) == min(64, number * windows // 10)


def test_some_of_the_held_out_texts_are_of_all_their_files():
    rows = [{"file": file, "number": number} for file in range(4) for number in range(20)]
    assert [row["file"] for row in some_of(rows, 16)] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert some_of(rows, 100) == rows
    assert some_of([], 3) == []


def test_evaluations_take_about_a_fifth_of_the_time():
    assert interval_of(64 * 100, 4 * 100.0) == 27  # 16 forward passes; 27 steps take as long as 81
    assert interval_of(4 * 100, 8 * 100.0) == 10


def test_a_number_of_steps_is_kept_and_held_out_texts_are_trained_on():
    rows = [{"input_ids": [number], "labels": [number]} for number in range(100)]
    for given in ({"max_steps": 3}, {"epochs": 2.0}, {"max_tokens": 50}):
        options = TrainOptions(**given)
        planned = plan(options, rows, None)
        assert planned == (options, rows, None, None, (), 0, True)


def test_eval_data_are_what_is_held_out():
    rows = [{"input_ids": [number], "labels": [number]} for number in range(100)]
    planned = plan(TrainOptions(eval_data=["x"], learning_rate=0.01), rows, rows[:20])
    assert planned.rows == rows
    assert planned.held_out == rows[:20]
    assert planned.options.learning_rate == 0.01
    assert (planned.options.eval_steps, planned.options.max_steps) == (10, 400)
    planned = plan(TrainOptions(eval_data=["x"], eval_steps=7), rows, rows[:20])
    assert (planned.options.eval_steps, planned.options.learning_rate) == (7, 5e-3)


@pytest.fixture
def weights_move():
    """Lets the weight move for any gain, as the tiny model's losses hardly depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_search, "_LEAST_GAIN", 0.0)
        yield


@pytest.mark.usefixtures("weights_move")
def test_it_ends_at_a_plateau_with_the_best_checkpoint(command, tmp_path, capsys):
    assert main(command("out", "--eval-steps", "3", "--learning-rate", "0.3")) == 0
    shown = capsys.readouterr()
    assert "until the loss on 6 held-out sequences stops falling, evaluated every 3 steps; at most 120" in shown.out
    assert "on 6 held-out sequences: loss " in shown.out
    _, state = log_of(tmp_path / "out")
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluations_of(tmp_path / "out") == [3 * number for number in range(len(losses))]
    assert state["global_step"] < 120
    # The rule is about the trained gate.
    losses = losses[1:]
    assert failures(losses) == 4
    assert failures(losses[:-1]) == 3
    # Constant after the warm-up, and 0.3 of it after each failure.
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry}
    late = [step for step in rates if step > 3]
    expected = [0.3 * 0.3 ** failures(losses[: (step - 1) // 3]) for step in late]
    assert [rates[step] for step in late] == pytest.approx(expected)
    # The saved mixture is the one with the lowest loss.
    best = json.loads((tmp_path / "out/adapter_config.json").read_text())["global_scaling_weight"]
    weights = [entry for entry in state["log_history"] if "global_scaling_weight" in entry]
    before = [entry for entry in weights if entry["step"] <= state["best_global_step"]]
    assert best == (before[-1]["global_scaling_weight"] if before else 1.0)


@pytest.mark.parametrize("more", [[], ["--max-steps", "9", "--eval-data", "texts.jsonl"]])
def test_a_start_that_no_training_improves_is_the_result(command, texts, tmp_path, more, monkeypatch):
    monkeypatch.chdir(tmp_path)
    still = ("--eval-steps", "3", "--learning-rate", "1e-30", "--global-scaling-weight", "1", "--gate-start", "losses")
    assert main(command("out", *still, *more)) == 0
    _, state = log_of(tmp_path / "out")
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert state["best_global_step"] == 0
    assert state["best_metric"] == losses[0] == min(losses)
    start = tmp_path / "out/checkpoints/checkpoint-0"
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (start / file).read_bytes()
    # A run that goes on from there is the same.
    for folder in start.parent.glob("checkpoint-[1-9]*"):
        shutil.rmtree(folder)
    assert main(command("out", *still, *more, "--resume", "true")) == 0
    again = log_of(tmp_path / "out")[1]
    for name in ("loss", "eval_loss", "learning_rate"):
        one, other = ([entry[name] for entry in run["log_history"] if name in entry] for run in (state, again))
        assert other == pytest.approx(one), name
    assert again["best_global_step"] == 0


@pytest.mark.usefixtures("weights_move")
def test_a_resumed_run_ends_as_the_whole_one(command, tmp_path, monkeypatch):
    assert main(command("whole", "--eval-steps", "3", "--learning-rate", "0.3", "--seed", "1")) == 0
    _, whole = log_of(tmp_path / "whole")

    def stop_at(step):
        original = WeightSearch.on_step_end

        def on_step_end(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            if state.global_step == step:
                control.should_training_stop = True

        monkeypatch.setattr(WeightSearch, "on_step_end", on_step_end)

    half = 3 * ((whole["global_step"] // 3) // 2)
    with monkeypatch.context():
        stop_at(half)
        assert main(command("part", "--eval-steps", "3", "--learning-rate", "0.3", "--seed", "1")) == 0
    monkeypatch.undo()
    assert log_of(tmp_path / "part")[1]["global_step"] == half
    assert main(command("part", "--eval-steps", "3", "--learning-rate", "0.3", "--seed", "1", "--resume", "true")) == 0
    _, part = log_of(tmp_path / "part")
    for name in ("eval_loss", "learning_rate", "global_scaling_weight"):
        one, other = ([entry[name] for entry in state["log_history"] if name in entry] for state in (whole, part))
        assert other == pytest.approx(one), name
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "part" / file).read_bytes().replace(b"part", b"whole") == (
            tmp_path / "whole" / file
        ).read_bytes().replace(b"part", b"whole")


@pytest.mark.usefixtures("weights_move")
def test_a_run_that_goes_on_for_a_number_of_steps_keeps_the_weight_it_has_found(command, tmp_path, capsys):
    options = ("--eval-steps", "3", "--learning-rate", "0.3", "--seed", "1")
    assert main(command("out", *options)) == 0
    last, state = log_of(tmp_path / "out")
    found = json.loads((last / "adapter_config.json").read_text())["global_scaling_weight"]
    assert found != 1.0
    more = ("--resume", "true", "--max-steps", str(state["global_step"] + 2))
    assert main(command("out", *options[2:], *more)) == 0
    assert weft.from_pretrained(tmp_path / "out").get_global_scaling_weight() == found
    # A weight that the run does not have is refused.
    capsys.readouterr()
    assert main(command("out", *options, "--resume", "true", "--global-scaling-weight", "3")) == 1
    assert f"global_scaling_weight (3.0) must be what the run to resume has ({found})" in capsys.readouterr().err


def test_too_few_texts_are_read_once_and_this_is_said(command, texts, tmp_path, capsys):
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"the quick brown fox {number}"}) for number in range(12)))
    few = [str(file) if value == texts else value for value in command("few")]
    assert main(few) == 0
    assert (
        "one pass over the data: 12 sequences, 40 are needed to hold out some (or eval_data)" in capsys.readouterr().out
    )


def test_a_weight_that_is_given_is_kept(command, tmp_path):
    assert main(command("given", "--eval-steps", "3", "--global-scaling-weight", "1.5")) == 0
    assert weft.from_pretrained(tmp_path / "given").get_global_scaling_weight() == 1.5
    _, state = log_of(tmp_path / "given")
    assert not [entry for entry in state["log_history"] if "global_scaling_weight" in entry]


class FakeTrainer:
    """Evaluates a parabola of the logarithm of the weight."""

    def __init__(self, model, best, curvature=1.0):
        self.model, self.best, self.curvature = model, best, curvature
        self.state = SimpleNamespace(log_history=[], global_step=0, best_global_step=None)

    def get_eval_dataloader(self, rows):
        return rows

    def evaluation_loop(self, rows, description, prediction_loss_only):
        loss = 2 + self.curvature * math.log(self.model.weight / self.best) ** 2
        return SimpleNamespace(metrics={"eval_loss": loss})

    def log(self, values):
        self.state.log_history.append({**values, "step": self.state.global_step})


class FakeModel:
    def __init__(self, weight):
        self.weight = weight

    def get_global_scaling_weight(self):
        return self.weight

    def set_global_scaling_weight(self, weight):
        self.weight = weight


@pytest.mark.parametrize(("best", "expected"), [(1.0, 1.0), (2.0, 1.2**4), (0.1, 1.2**-3), (9.0, 1.2**7)])
def test_the_weight_climbs_to_the_best_one_within_its_limits(best, expected):
    model = FakeModel(1.0)
    trainer = FakeTrainer(model, best)
    search = WeightSearch(trainer, model, [{}] * 20)
    for step in range(1, 11):
        trainer.state.global_step = step
        search.on_step_end(None, trainer.state, SimpleNamespace(should_evaluate=True))
    assert model.weight == pytest.approx(expected)


@pytest.mark.parametrize(
    ("step", "log", "stops", "expected"),
    [(0, [], False, 1.2), (3, [], False, 1.0), (0, [], True, 1.0), (0, [{"step": 0, "eval_loss": 3.0}], False, 1.0)],
)
def test_the_weight_moves_before_the_first_step_of_a_run_that_begins(step, log, stops, expected):
    model = FakeModel(1.0)
    trainer = FakeTrainer(model, 2.0)
    trainer.state.global_step, trainer.state.log_history = step, log
    search = WeightSearch(trainer, model, [{}])
    search.on_train_begin(None, trainer.state, SimpleNamespace(should_training_stop=stops))
    assert model.weight == pytest.approx(expected)


@pytest.mark.parametrize("start", [1.0, 1.44, 1 / 1.44])
def test_a_weight_that_is_hardly_better_is_not_worth_being_further_from_1(start):
    model = FakeModel(start)
    trainer = FakeTrainer(model, start, curvature=0.05)
    search = WeightSearch(trainer, model, [{}])
    for step in range(1, 4):
        trainer.state.global_step = step
        search.on_step_end(None, trainer.state, SimpleNamespace(should_evaluate=True))
    assert model.weight == pytest.approx(1.0)


def test_the_comparison_has_the_losses_of_evaluation(mixture):
    model = weft.from_pretrained(mixture)
    sequences = [[1, 5, 9, 4, 7, 3], [2, 8, 6, 4], [3, 3, 7, 9, 11], [9, 1, 2, 6, 5]]
    rows = [{"input_ids": sequence, "labels": [-100, *sequence[1:]]} for sequence in sequences]
    losses = {"weft": math.log(perplexity(model, sequences, 2))}
    for name in ("math", "code"):
        with at_own_weight(model, {name: 1.0}):
            losses[name] = math.log(perplexity(model, sequences, 2))
    with model.disable_adapter():
        losses["base"] = math.log(perplexity(model, sequences, 2))
    best = min(("math", "code"), key=losses.get)
    said = comparison(model, rows, batch_size=3)
    assert said.startswith(
        f"on 4 held-out sequences: loss {losses['weft']:.3f}, base model {losses['base']:.3f}, best expert alone "
        f"({best}) {losses[best]:.3f}. At least as good as each sequence's best expert on "
    )
    # Tokens without a label do not count.
    for row in rows:
        row["labels"] = [*row["labels"][:-1], -100]
    assert comparison(model, rows, batch_size=3) != said


# ---------------------------------------------------------------------- runs that resume


def evaluations_of(folder):
    return [entry["step"] for entry in log_of(folder)[1]["log_history"] if "eval_loss" in entry]


def test_a_run_that_resumes_evaluates_saves_and_logs_as_often_as_it_says(command, tmp_path):
    assert main(command("out", "--max-steps", "4")) == 0
    assert main(command("out", "--eval-steps", "5", "--logging-steps", "2", "--resume", "true")) == 0
    steps = evaluations_of(tmp_path / "out")
    assert steps[0] == 5
    assert all(step % 5 == 0 for step in steps)
    _, state = log_of(tmp_path / "out")
    assert {entry["step"] % 2 for entry in state["log_history"] if "loss" in entry} == {0}
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert failures(losses) == 4


@pytest.mark.parametrize("given", [["--max-steps", "7"], ["--max-tokens", "600"], ["--epochs", "0.7"]])
def test_a_run_that_is_done_takes_no_further_step(command, tmp_path, given):
    assert main(command("out", *given)) == 0
    before = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    last, _ = log_of(tmp_path / "out")
    assert main(command("out", *given, "--resume", "true")) == 0
    assert log_of(tmp_path / "out")[0] == last
    assert (tmp_path / "out/adapter_model.safetensors").read_bytes() == before


def test_a_run_that_ended_at_a_plateau_is_over(command, tmp_path, capsys):
    options = ("--eval-steps", "3", "--learning-rate", "0.3")
    assert main(command("out", *options)) == 0
    last, _ = log_of(tmp_path / "out")
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").glob("adapter_*")}
    capsys.readouterr()
    assert main(command("out", *options, "--resume", "true")) == 0
    said = "no step is left: this run has ended at a plateau. Give max_steps, epochs or max_tokens to train further"
    assert said in capsys.readouterr().out
    assert log_of(tmp_path / "out")[0] == last
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("adapter_*")} == files


def test_other_data_are_trained_with_and_the_same_texts_stay_held_out(command, texts, tmp_path, capsys):
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(json.dumps({"text": f"another text {number}"}) for number in range(100)))
    options = ("--eval-steps", "3", "--learning-rate", "0.3")
    assert main(command("out", *options)) == 0
    last, state = log_of(tmp_path / "out")
    held_out = json.loads((last / "weft_run.json").read_text())["held_out"]
    both = command("out", *options, "--resume", "true", "--seed", "5")
    both.insert(both.index(texts) + 1, str(more))
    capsys.readouterr()
    assert main(both) == 0
    assert "with other texts than before and the first learning rate" in capsys.readouterr().out
    assert main([*both, "--dry-run", "true"]) == 0
    assert "with other texts than before" not in capsys.readouterr().out  # as they were before this time
    later, after = log_of(tmp_path / "out")
    now = json.loads((later / "weft_run.json").read_text())["held_out"]
    assert now == {**held_out, "since": state["global_step"]}
    losses = [entry["eval_loss"] for entry in after["log_history"] if "eval_loss" in entry]
    before = [entry for entry in state["log_history"] if "eval_loss" in entry]
    assert failures(losses[len(before) :]) == 4
    first = next(e for e in after["log_history"] if e["step"] > state["global_step"] and "learning_rate" in e)
    assert first["learning_rate"] == pytest.approx(0.3)


def test_losses_of_other_held_out_texts_are_not_compared(command, tmp_path, capsys):
    files = []
    for number, words in enumerate(("over the lazy dog", "q")):
        files.append(tmp_path / f"eval{number}.jsonl")
        files[-1].write_text("\n".join(json.dumps({"text": f"{words} {n}"}) for n in range(6)))
    options = ("--eval-steps", "3", "--learning-rate", "0.3", "--eval-data")
    assert main(command("out", *options, str(files[0]))) == 0
    done = log_of(tmp_path / "out")[1]["global_step"]
    assert main(command("out", *options, str(files[1]), "--resume", "true")) == 0
    state = log_of(tmp_path / "out")[1]
    assert state["best_global_step"] > done
    losses = [e["eval_loss"] for e in state["log_history"] if "eval_loss" in e and e["step"] > done]
    assert failures(losses) == 4
    assert state["best_metric"] == min(losses)


def test_the_same_texts_are_held_out_from_more_data_and_equal_ones_as_often_as_before():
    rows = [{"input_ids": [number], "labels": [number]} for number in range(100)]
    _, held_out = split(rows, seed=0)
    more = rows + [{"input_ids": [number], "labels": [number]} for number in range(1000, 2000)]
    digests = [digest_of(row) for row in held_out]
    rest, again = split(more, 1, digests)
    assert again == held_out
    assert len(rest) == 1090
    same = [{"input_ids": [1], "labels": [1]}] * 60
    rest, again = split(same, 1, [digest_of(same[0])] * 6)
    assert (len(rest), len(again)) == (54, 6)
    # Too few of them are left: others are drawn.
    assert len(split(more[100:], 0, digests)[1]) == 64


def test_the_limit_is_in_passes_over_the_packed_rows():
    rows = [{"input_ids": [1] * 24, "labels": [1] * 24} for _ in range(5000)]
    said = []
    options = TrainOptions(packing=True, sequence_length=480, batch_size=4)
    planned = plan(options, rows, None, said.append)
    batches = math.ceil(math.ceil((5000 - 64) / 20) / 4)
    assert planned.options.max_steps == max(10 * batches, 40 * planned.options.eval_steps)
    assert planned.options.eval_steps == 10  # 64 texts are less than one packed batch of 80
    assert f"at most {planned.options.max_steps} steps" in said[0]


def test_an_interrupted_trial_leaves_the_weight_of_the_run():
    model = FakeModel(1.2)
    trainer = FakeTrainer(model, 2.0)

    def interrupted(*args, **kwargs):
        if model.weight > 1.3:
            raise KeyboardInterrupt
        return FakeTrainer.evaluation_loop(trainer, *args, **kwargs)

    trainer.evaluation_loop = interrupted
    with pytest.raises(KeyboardInterrupt):
        WeightSearch(trainer, model, [{}]).on_step_end(None, trainer.state, SimpleNamespace(should_evaluate=True))
    assert model.weight == 1.2


def test_texts_that_are_cut_in_another_way_stay_held_out_as_a_whole():
    rows = [{"input_ids": [text, part], "place": text} for text in range(60) for part in range(3)]
    _, held_out = split(rows, seed=0)
    # Only the first window of each text is what it was.
    cut = [{**row, "input_ids": [*row["input_ids"], 7] if row["input_ids"][1] else row["input_ids"]} for row in rows]
    rest, again = split(cut, seed=1, before=[digest_of(row) for row in held_out])
    assert {row["place"] for row in again} == {row["place"] for row in held_out}
    assert not {row["place"] for row in again} & {row["place"] for row in rest}


def test_early_stopping_takes_the_texts_that_are_held_out(command, tmp_path):
    still = ("--eval-steps", "3", "--learning-rate", "1e-12", "--global-scaling-weight", "1")
    assert main(command("out", *still, "--early-stopping", "1")) == 0
    assert evaluations_of(tmp_path / "out") == [0, 3]


def test_early_stopping_counts_the_evaluations_before_a_run_was_resumed(command, tmp_path):
    still = ("--eval-steps", "3", "--learning-rate", "1e-12", "--global-scaling-weight", "1", "--early-stopping", "2")
    assert main(command("out", *still, "--max-steps", "3", "--eval-data", str(tmp_path / "texts.jsonl"))) == 0
    more = command("out", *still, "--max-steps", "30", "--eval-data", str(tmp_path / "texts.jsonl"), "--resume", "true")
    for _ in range(2):
        assert main(more) == 0
        assert evaluations_of(tmp_path / "out") == [0, 3, 6]


def test_a_run_that_held_nothing_out_says_that_it_may_have_trained_on_what_it_holds_out_now(command, tmp_path, capsys):
    assert main(command("out", "--max-steps", "2")) == 0
    capsys.readouterr()
    assert main(command("out", "--resume", "true", "--dry-run", "true")) == 0
    said = capsys.readouterr().out
    assert "the held-out sequences are not those of the run to resume, and it may have trained on them" in said
    assert "Held-out texts end it: it can be fewer steps, or more, at most 400" in said


def test_a_run_past_the_limit_of_other_options_is_over(command, tmp_path, capsys):
    assert main(command("out", "--max-steps", "50")) == 0
    more = ("--eval-steps", "1", "--batch-size", "60", "--resume", "true")
    capsys.readouterr()
    assert main(command("out", *more)) == 0
    assert "no step is left: this run has reached its limit of 40 steps." in capsys.readouterr().out

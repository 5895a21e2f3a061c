"""A run that resumes says from where, and what has changed; what makes no sense is refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.cli import main
from weft.train.checkpoints import RECORD, write_record
from weft.train.run_record import RUN_RECORD, changes_since

TENSORS = "adapter_model.safetensors"
SKIPPED = "  the steps that are done are skipped: until the end of this epoch, texts may repeat or be missed"


@pytest.fixture
def paths(base_folder, base_adapters, tmp_path):
    """Base model, adapters and data of a run, as copies that may be changed."""
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"the quick brown fox {number}"}) for number in range(8)))
    adapters = {name: shutil.copytree(path, tmp_path / "adapters" / name) for name, path in base_adapters.items()}
    return {"base": shutil.copytree(base_folder, tmp_path / "my-model"), **adapters, "data": data}


@pytest.fixture
def train(paths, tmp_path, capsys):
    """`weft train` of the run in "out", with other options and paths; what it prints, or says is wrong."""

    def train(*more, **moved):
        at = {**paths, **moved}
        fixed = ["--base", str(at["base"]), "--adapters", f"math={at['math']}", f"code={at['code']}"]
        fixed += ["--data", str(at["data"]), "--output", str(tmp_path / "out"), "--gate-start", "random"]
        options = ["--batch-size", "2", "--learning-rate", "0.01", "--sequence-length", "16", "--save-steps", "2"]
        code = main(["train", *fixed, *options, "--max-steps", "4", "--logging-steps", "1", *more])
        printed = capsys.readouterr()
        return printed.out if code == 0 else printed.err

    train()
    return train


def resumed(train, *more, **moved):
    """The lines about what goes on, of a run that resumes."""
    lines = train("--max-steps", "6", "--resume", *more, **moved).splitlines()
    (start,) = [number for number, line in enumerate(lines) if line.startswith("resuming from step")]
    changes = lines[start + 1 :]
    return lines[start], changes[: next(number for number, line in enumerate(changes) if not line.startswith("  "))]


def state(tmp_path, step=6):
    return json.loads((tmp_path / f"out/checkpoints/checkpoint-{step}/trainer_state.json").read_text())


MORE = "  max_steps: 4 -> 6"
CHANGES = {
    "more steps": ([], []),
    "learning rate": (["--learning-rate", "0.02"], ["  learning_rate: 0.01 -> 0.02"]),
    "batch size": (["--batch-size", "4"], ["  batch_size: 2 -> 4", SKIPPED]),
    "the same in two passes": (["--batch-size", "1", "--gradient-accumulation-steps", "2"], []),
    "sequence length": (["--sequence-length", "8"], ["  sequence_length: 16 -> 8", SKIPPED]),
    "seed": (["--seed", "1"], ["  seed: 0 -> 1", SKIPPED]),
}


@pytest.mark.parametrize(("options", "lines"), CHANGES.values(), ids=CHANGES)
def test_it_says_from_where_and_what_has_changed(options, lines, train):
    assert resumed(train, *options) == ("resuming from step 4, with changes:", [MORE, *lines])


def test_a_run_that_resumes_as_it_was_says_no_more_than_that(train, tmp_path):
    expected = load_file(tmp_path / "out" / TENSORS)
    shutil.rmtree(tmp_path / "out/checkpoints/checkpoint-4")
    lines = train("--resume").splitlines()
    assert "resuming from step 2" in lines
    found = load_file(tmp_path / "out" / TENSORS)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_present_learning_rate_and_batch_size_are_trained_with(train, tmp_path):
    rates, tokens = [], []
    for rate, size in (("0.01", "2"), ("0.02", "4")):
        before = shutil.copytree(tmp_path / "out", tmp_path / f"before-{rate}")
        resumed(train, "--learning-rate", rate, "--batch-size", size)
        rates.append([entry["learning_rate"] for entry in state(tmp_path)["log_history"] if entry["step"] > 4])
        seen = [state(tmp_path, step)["num_input_tokens_seen"] for step in (4, 6)]
        tokens.append(seen[1] - seen[0])
        shutil.rmtree(tmp_path / "out")
        before.rename(tmp_path / "out")
    assert len(rates[0]) == len(rates[1]) == 2
    assert rates[0][0] > 0  # it was 0 at the end of four steps, and is not of six
    assert tokens[1] > 1.5 * tokens[0]
    assert rates[1] == pytest.approx([2 * rate for rate in rates[0]])


def test_other_data_is_named_and_moved_data_is_the_same(train, paths, tmp_path):
    copy = shutil.copy(paths["data"], tmp_path / "moved.jsonl")
    assert resumed(train, data=copy) == ("resuming from step 4, with changes:", [MORE])
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a lazy dog"}\n' * 9)
    lines = resumed(train, "--max-steps", "7", data=other)[1]
    assert lines == ["  max_steps: 6 -> 7", f"  data: {copy} -> {other}", SKIPPED]
    other.write_text('{"text": "an eager dog"}\n' * 9)
    assert resumed(train, "--max-steps", "8", data=other)[1] == [
        "  max_steps: 7 -> 8",
        f"  data: {other} has changed",
        SKIPPED,
    ]


def test_moved_models_are_the_same(train, paths, tmp_path):
    moved = {name: paths[name].rename(tmp_path / f"moved-{name}") for name in ("base", "math")}
    assert resumed(train, **moved) == ("resuming from step 4, with changes:", [MORE])


def noise(folder):
    (file,) = folder.glob("*.safetensors")
    save_file({key: torch.randn_like(value) for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["base", "math"])
def test_another_base_or_adapter_is_refused(name, train, paths, tmp_path):
    what = "base" if name == "base" else "adapter 'math'"
    other = shutil.copytree(paths[name], tmp_path / "other")
    noise(other)
    error = train("--resume", **{name: other})
    assert f"{what} ({other}) must be what the run to resume has ({paths[name]})" in error
    noise(paths[name])
    error = train("--resume")
    assert f"{what} ({paths[name]}) must be as it was when the checkpoint was saved: its weights have changed" in error


def test_fewer_steps_than_are_done_are_refused(train, tmp_path):
    assert "max_steps (3) must be at least the steps that are done (4)" in train("--resume", "--max-steps", "3")
    tokens = state(tmp_path, 4)["num_input_tokens_seen"]
    error = train("--resume", "--max-tokens", "5")
    assert f"max_tokens (5) must be at least the tokens that are done ({tokens})" in error
    error = train("--resume", "--max-steps", "0", "--epochs", "0.2")
    assert "epochs (0.2) are 2 steps of this data, fewer than are done (4)" in error
    assert "resuming from step 4" in train("--resume", "--max-steps", "4")  # of a run that is complete


def test_all_that_is_refused_is_said_at_once(train, paths):
    error = train("--resume", "--max-steps", "3", "--xlora-depth", "1", math=paths["code"])
    assert [line[4:].split(" ")[0] for line in error.splitlines()[1:]] == ["xlora_depth", "max_steps", "adapter"]


def test_with_deepspeed_another_learning_rate_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr("weft.train.run_record.deepspeed_is_to_come", lambda: True)
    error = train("--resume", "--learning-rate", "0.5")
    assert "learning_rate (0.5) must be what the run to resume has (0.01): DeepSpeed keeps it" in error


def test_checkpoints_of_earlier_versions_are_resumed_from(train, tmp_path):
    for checkpoint in (tmp_path / "out/checkpoints").glob("checkpoint-*"):
        (checkpoint / RUN_RECORD).unlink()
        (checkpoint / RECORD).unlink()
        write_record(checkpoint)
    assert resumed(train, "--learning-rate", "0.02") == ("resuming from step 4", [])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, r"weft_run.json: format_version \(2\) must be 1: a newer weft's"),
        ({"options": 5}, r"weft_run.json: options \(5\) must be a JSON object"),
        ({"base": {"digest": 5}}, r"weft_run.json: base: digest \(5\) must be a string"),
    ],
    ids=str,
)
def test_a_record_that_cannot_be_read_is_named(changed, message, train, tmp_path):
    checkpoint = tmp_path / "out/checkpoints/checkpoint-4"
    file = checkpoint / RUN_RECORD
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    write_record(checkpoint)
    assert re.search(message, train("--resume"))


def test_a_batch_over_other_processes_is_the_same(train, tmp_path):
    checkpoint = Path(tmp_path, "out/checkpoints/checkpoint-4")
    record = json.loads((checkpoint / RUN_RECORD).read_text())
    options = {**record["options"], "batch_size": 1, "processes": 2}
    assert changes_since(checkpoint, {**record, "options": options}) == []
    options["processes"] = 4
    assert changes_since(checkpoint, {**record, "options": options})[:2] == ["batch_size: 2 -> 1", "processes: 1 -> 4"]

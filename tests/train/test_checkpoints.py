"""Resuming takes the newest whole checkpoint, and says which it passes over and why."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft
from models import folder_files
from weft.cli import main
from weft.train.checkpoints import RECORD, find_checkpoints, last_checkpoint

TENSORS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"


@pytest.fixture
def train(base_folder, base_adapters, tmp_path):
    """`weft train` of six steps, of which the last two even ones have checkpoints."""
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"the quick brown fox {number}"}) for number in range(8)))
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]

    def train(*more, output="out"):
        fixed = ["--base", str(base_folder), "--adapters", *adapters, "--data", str(data), "--batch-size", "2"]
        steps = ["--max-steps", "6", "--save-steps", "2", "--gate-start", "random", "--learning-rate", "0.01"]
        return main(["train", *fixed, *steps, "--output", str(tmp_path / output), *more])

    return train


@pytest.fixture
def trained(train, tmp_path, capsys):
    """(the folder of its checkpoints, what it left)."""
    assert train() == 0
    capsys.readouterr()
    return tmp_path / "out/checkpoints", load_file(tmp_path / "out" / TENSORS)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def noise(file):
    save_file({key: torch.randn_like(value) for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def renamed(file):
    save_file({f"x{key}": value for key, value in load_file(file).items()}, file, metadata={"format": "pt"})


def truncated(file):
    file.write_bytes(file.read_bytes()[:-9])


def flipped(file):
    """With one bit of a tensor changed."""
    with zipfile.ZipFile(file) as opened:
        value = max((part for part in opened.infolist() if "/data/" in part.filename), key=lambda part: part.file_size)
        place = file.read_bytes().index(opened.read(value))
    content = bytearray(file.read_bytes())
    content[place + value.file_size // 2] ^= 1
    file.write_bytes(content)


def lost(file):
    file.unlink()


CHANGED = "{} was changed after it was saved"
DAMAGES = {
    "a gate of noise": (noise, TENSORS, CHANGED),
    "a gate under other keys": (renamed, TENSORS, CHANGED),
    "a gate cut off": (truncated, TENSORS, CHANGED),
    "no gate": (lost, TENSORS, "{} is missing"),
    "an optimizer cut off": (truncated, OPTIMIZER, CHANGED),
    "an optimizer with one bit changed": (flipped, OPTIMIZER, CHANGED),
    "no optimizer": (lost, OPTIMIZER, "{} is missing"),
    "no scheduler": (lost, "scheduler.pt", "{} is missing"),
    "a scheduler cut off": (truncated, "scheduler.pt", CHANGED),
    "no random state": (lost, "rng_state.pth", "{} is missing"),
    "a random state cut off": (truncated, "rng_state.pth", CHANGED),
    "a state cut off": (truncated, STATE, CHANGED),
    "an expert of noise": (noise, f"experts/math/{TENSORS}", CHANGED),
    "digests cut off": (truncated, RECORD, None),
}


@pytest.mark.parametrize(("damage", "name", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_by_name_and_the_one_before_taken(
    damage, name, reason, train, trained, tmp_path, capsys
):
    checkpoints, expected = trained
    damage(checkpoints / "checkpoint-6" / name)
    if reason is None:
        reason = f"{checkpoints}/checkpoint-6/{RECORD} is no valid JSON"
    assert train("--resume", "true") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"checkpoint-6 is passed over: {reason.format(name)}")
    assert lines[0].endswith("; going on from checkpoint-4")
    assert same(load_file(tmp_path / "out" / TENSORS), expected)
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")  # written anew


OLD = {
    "a gate of noise": (noise, TENSORS, f"{TENSORS}: changed tensors"),
    "a gate under other keys": (renamed, TENSORS, f"{TENSORS}: missing keys"),
    "a gate cut off": (truncated, TENSORS, "is no whole safetensors file"),
    "no manifest": (lost, "weft_manifest.json", "weft_manifest.json is missing"),
    "an optimizer cut off": (truncated, OPTIMIZER, "optimizer.pt is not whole"),
    "an optimizer with one bit changed": (flipped, OPTIMIZER, "optimizer.pt is not whole"),
    "no optimizer": (lost, OPTIMIZER, "optimizer.pt is missing"),
    "no random state": (lost, "rng_state.pth", "rng_state.pth is missing"),
    "another step's state": (
        lambda file: file.write_text(file.read_text().replace('"global_step": 6', '"global_step": 5')),
        STATE,
        "trainer_state.json is of step 5",
    ),
}


@pytest.mark.parametrize(("damage", "name", "reason"), OLD.values(), ids=OLD)
def test_checkpoints_of_earlier_versions_must_be_readable(damage, name, reason, train, trained, tmp_path, capsys):
    checkpoints, expected = trained
    for number in (4, 6):
        (checkpoints / f"checkpoint-{number}" / RECORD).unlink()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    damage(checkpoints / "checkpoint-6" / name)
    assert train("--resume", "true") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert line.startswith("checkpoint-6 is passed over: ")
    assert reason in line
    assert same(load_file(tmp_path / "out" / TENSORS), expected)


def test_a_checkpoint_has_the_digests_of_all_that_resuming_reads(trained):
    checkpoints, _ = trained
    record = json.loads((checkpoints / "checkpoint-6" / RECORD).read_text())
    assert record["format_version"] == 1
    files = {name for name in folder_files(checkpoints / "checkpoint-6") if not name.endswith(".md")}
    assert record["files"].keys() == files - {RECORD}
    assert record["files"][OPTIMIZER]["bytes"] == (checkpoints / "checkpoint-6" / OPTIMIZER).stat().st_size
    (checkpoints / "checkpoint-6/README.md").write_text("a card")  # of the user's
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-6" / RECORD).write_text(json.dumps(record | {"format_version": 2}))
    (found,) = find_checkpoints(checkpoints).damaged.values()
    assert found == f"{RECORD} is of format_version 2, expected 1: a newer weft's"
    (checkpoints / "checkpoint-6" / RECORD).write_text(json.dumps(record | {"files": [1]}))
    assert find_checkpoints(checkpoints).damaged == {checkpoints / "checkpoint-6": "its digests are garbled"}


def test_a_checkpoint_that_was_not_completed_does_not_count(train, trained, tmp_path, capsys):
    checkpoints, expected = trained
    shutil.rmtree(checkpoints / "checkpoint-4")
    for file in (tmp_path / "out").iterdir():  # the mixture, which comes at the end
        if file != checkpoints:
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    half = checkpoints / "checkpoint-6"
    (half / RECORD).unlink()
    (half / STATE).write_text('{"epo')
    (checkpoints / "checkpoint-9").mkdir()
    (checkpoints / "runs").mkdir()
    assert train("--resume", "true") == 1
    error = capsys.readouterr().err
    assert (
        f"resume (True) found no checkpoint in {checkpoints}, only what was not completed and does not count: leave it "
        "out to start anew" in error
    )
    assert half.exists()
    assert train() == 0  # as it says
    assert same(load_file(tmp_path / "out" / TENSORS), expected)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-4", "checkpoint-6", "runs"]


def test_one_that_was_not_completed_is_passed_over(train, trained, tmp_path, capsys):
    checkpoints, expected = trained
    for name in (RECORD, STATE):
        (checkpoints / "checkpoint-6" / name).unlink()
    (checkpoints / "checkpoint-10").mkdir()
    assert train("--resume", "true") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "passed over" in line]
    assert lines == [
        f"checkpoint-{number} is passed over: it was not completed; going on from checkpoint-4" for number in (10, 6)
    ]
    assert not (checkpoints / "checkpoint-10").exists()
    assert same(load_file(tmp_path / "out" / TENSORS), expected)


def test_damaged_ones_alone_are_named_and_removed_by_nobody_but_the_user(train, trained, tmp_path, capsys):
    checkpoints, expected = trained
    lost(checkpoints / "checkpoint-4" / OPTIMIZER)
    noise(checkpoints / "checkpoint-6" / TENSORS)
    said = f"checkpoint-6 ({TENSORS} was changed after it was saved), checkpoint-4 (optimizer.pt is missing); "
    assert train("--resume", "true") == 1
    error = capsys.readouterr().err
    assert (
        f"resume (True) found no whole checkpoint in {checkpoints}: {said}leave it out, and give another folder or "
        f"remove {tmp_path}/out" in error
    )
    assert train() == 1
    error = capsys.readouterr().err
    assert f"output ({tmp_path}/out) holds the checkpoints of a run: give another folder, or --resume true" in error
    assert train(output="another") == 0
    assert same(load_file(tmp_path / "another" / TENSORS), expected)
    shutil.rmtree(tmp_path / "out")
    assert train("--resume", "true") == 1
    assert f"resume (True) found no checkpoint in {checkpoints}: leave it out to start anew" in capsys.readouterr().err
    assert train() == 0
    assert same(load_file(tmp_path / "out" / TENSORS), expected)


def test_a_run_with_a_whole_checkpoint_is_not_started_anew(train, trained, capsys):
    checkpoints, _ = trained
    lost(checkpoints / "checkpoint-6" / OPTIMIZER)
    assert train() == 1
    assert "holds the checkpoints of a run: give another folder, or --resume true" in capsys.readouterr().err
    assert train("--resume", "true") == 0


def test_the_last_whole_one_is_never_removed_for_those_that_were_passed_over(train, trained, tmp_path, capsys):
    checkpoints, expected = trained
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-8")
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-9")
    for number in (6, 8, 9):
        lost(checkpoints / f"checkpoint-{number}" / OPTIMIZER)
    assert train("--resume", "true") == 0
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["checkpoint-4", "checkpoint-6", "checkpoint-8", "checkpoint-9"]
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    assert same(load_file(tmp_path / "out" / TENSORS), expected)


def test_a_best_checkpoint_that_was_damaged_is_not_come_back_to(train, tmp_path, capsys):
    data = tmp_path / "held-out.jsonl"
    data.write_text(json.dumps({"text": "the quick brown fox 3"}))
    options = ["--eval-data", str(data), "--learning-rate", "1e-30"]  # at which the start stays the best
    assert train(*options) == 0
    checkpoints = tmp_path / "out/checkpoints"
    state = json.loads((checkpoints / "checkpoint-6" / STATE).read_text())
    best = tmp_path / state["best_model_checkpoint"]
    assert best.name != "checkpoint-6"
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "out", moved)
    before = load_file(tmp_path / "out" / TENSORS)
    noise(best / TENSORS)

    capsys.readouterr()
    assert train(*options, "--resume", "true", output="moved") == 0  # and finds its own best one there
    assert "passed over" not in capsys.readouterr().out
    assert same(load_file(moved / TENSORS), before)

    assert train(*options, "--max-steps", "8", "--resume", "true") == 0
    assert (
        f"{best.name}, the best so far, is passed over: {TENSORS} was changed after it was saved; the best from "
        "checkpoint-6 on is taken" in capsys.readouterr().out
    )
    after = load_file(tmp_path / "out" / TENSORS)
    assert same(after, load_file(checkpoints / "checkpoint-8" / TENSORS))


def test_the_best_checkpoint_is_not_forgotten_by_a_run_that_resumes_from_it(train, tmp_path):
    data = tmp_path / "held-out.jsonl"
    data.write_text(json.dumps({"text": "the quick brown fox 3"}))
    options = ["--eval-data", str(data), "--learning-rate", "3"]  # which makes the later ones worse
    assert train(*options) == 0
    checkpoints = tmp_path / "out/checkpoints"
    best = Path(json.loads((checkpoints / "checkpoint-6" / STATE).read_text())["best_model_checkpoint"]).name
    before = load_file(tmp_path / "out" / TENSORS)
    for later in checkpoints.glob("checkpoint-*"):
        if int(later.name.partition("-")[2]) > int(best.partition("-")[2]):
            shutil.rmtree(later)
    assert train(*options, "--resume", "true") == 0
    assert json.loads((checkpoints / "checkpoint-6" / STATE).read_text())["best_model_checkpoint"].endswith(best)
    assert same(load_file(tmp_path / "out" / TENSORS), before)


def test_what_deepspeed_saved_takes_deepspeed(train, trained, monkeypatch):
    checkpoints, _ = trained
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    without = "the state of its optimizer was saved without DeepSpeed, which must be used as it was"
    assert set(find_checkpoints(checkpoints).damaged.values()) == {without}
    for number in (4, 6):
        checkpoint = checkpoints / f"checkpoint-{number}"
        (checkpoint / f"global_step{number}").mkdir()
        (checkpoint / OPTIMIZER).rename(checkpoint / f"global_step{number}/mp_rank_00_model_states.pt")
        (checkpoint / "scheduler.pt").unlink()
        (checkpoint / RECORD).unlink()
    assert set(find_checkpoints(checkpoints).damaged.values()) == {"latest is missing"}
    for number in (4, 6):
        (checkpoints / f"checkpoint-{number}/latest").write_text(f"global_step{number}")
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-6")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert set(find_checkpoints(checkpoints).damaged.values()) == {without.replace("without", "with")}


def test_start_from_verifies_a_checkpoint_too(train, trained, base_folder, tmp_path, capsys):
    checkpoints, _ = trained
    noise(checkpoints / "checkpoint-6" / TENSORS)
    fixed = ["--start-from", str(checkpoints / "checkpoint-6"), "--data", str(tmp_path / "texts.jsonl")]
    assert main(["train", *fixed, "--output", str(tmp_path / "other")]) == 1
    assert "checkpoint-6 is not as it was saved" in capsys.readouterr().err
    assert weft.from_pretrained(checkpoints / "checkpoint-4") is not None

"""Saving replaces all or nothing, also on a disk that is full half-way."""

import json
import os
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

import weft
from models import folder_files, randomise, tiny_llama
from weft.cli import main
from weft.errors import CheckpointError
from weft.whole import replace_file, replace_folder
from weft.whole_checkpoints import keep_checkpoints_whole, last_checkpoint

TOKENS = torch.arange(1, 19).view(2, 9)


@contextmanager
def full_disk(size=3000):
    """No file can grow beyond this size: writing fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder):
    return {name: (folder / name).read_bytes() for name in folder_files(folder)}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "parts").mkdir(parents=True)
    for name in ("config", "data", "parts/old", "own"):
        (folder / name).write_text("old")
    return folder


def write(part):
    (part / "parts").mkdir()
    for name in ("config", "data", "parts/new"):
        (part / name).write_text("new")


def test_entries_are_replaced_whole_and_others_stay(folder):
    replace_folder(folder, write, "config")
    assert contents(folder) == {"config": b"new", "data": b"new", "parts/new": b"new", "own": b"old"}


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    replace_folder(tmp_path / "a/b", write, "config")
    assert contents(tmp_path / "a/b") == {"config": b"new", "data": b"new", "parts/new": b"new"}


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")], ids=str
)
def test_a_failed_write_leaves_everything_as_it_was(error, folder, tmp_path):
    def fail(part):
        write(part)
        raise error

    before = contents(folder)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as raised:
        replace_folder(folder, fail, "config")
    assert contents(folder) == before
    with pytest.raises(expected):
        replace_folder(tmp_path / "none", fail, "config")
    assert not (tmp_path / "none").exists()
    if expected is CheckpointError:
        assert str(raised.value) == (
            f"{folder} cannot be written: [Errno 28] No space left on device (what was there before is unchanged); "
            "free some space, or give another folder"
        )


@pytest.mark.parametrize("moved", range(1, 6))
def test_a_process_killed_between_two_renames_leaves_the_old_entries_to_the_next(moved, folder, monkeypatch):
    before, rename = contents(folder), os.rename

    def killed(*paths):
        nonlocal moved
        moved -= 1
        if moved < 0:
            raise SystemExit
        rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("weft.whole.os.rename", killed)
        patched.setattr("weft.whole._settle", lambda folder: None)
        patched.setattr("weft.whole.shutil.rmtree", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit):
            replace_folder(folder, write, "config")
    assert not (folder / "config").exists()  # so that nothing loads a mix of both
    with pytest.raises(ValueError, match="x"):
        replace_folder(folder, lambda part: int("x"), "config")
    assert contents(folder) == before


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        replace_file(file, lambda path: path.write_bytes(b"x" * 4000))
    assert contents(tmp_path) == {"file": b"old"}


# ---------------------------------------------------------------------- mixtures


@pytest.fixture
def saved(llama_adapters, tmp_path):
    """A model as it was saved, and its folder."""
    folder = tmp_path / "mixture"
    model = weft.from_adapters(tiny_llama(), llama_adapters, use_trainable_adapters=True)
    model.save_pretrained(folder)
    (folder / "README.md").write_text("---\n---\nmy own card")
    return model, folder


def test_a_model_that_cannot_be_saved_leaves_the_one_that_was_there(saved):
    model, folder = saved
    before = contents(folder)
    randomise(model, seed=9)
    with full_disk(), pytest.raises(CheckpointError, match=r"/mixture cannot be written: .*File too large"):
        model.save_pretrained(folder)
    assert contents(folder) == before
    weft.from_pretrained(folder, tiny_llama())
    model.save_pretrained(folder)
    assert contents(folder) != before
    assert "my own card" in (folder / "README.md").read_text()


def test_an_expert_that_cannot_be_added_leaves_the_mixture(saved, llama_adapters):
    _, folder = saved
    before = contents(folder)
    with full_disk():
        for output in (folder, folder.with_name("other")):
            with pytest.raises(CheckpointError, match=f"{output.name} cannot be written: .*File too large"):
                weft.add_expert(folder, "new", llama_adapters["math"], output, base=tiny_llama())
            with pytest.raises(CheckpointError, match=f"{output.name} cannot be written: .*File too large"):
                weft.drop_expert(folder, "math", output)
    assert contents(folder) == before
    assert not folder.with_name("other").exists()


@pytest.fixture
def train(base_folder, base_adapters, tmp_path):
    """`weft train` with so many steps, and more options."""
    data = tmp_path / "texts.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"the quick brown fox {number}"}) for number in range(8)))
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]

    def train(steps, *more):
        fixed = ["--base", str(base_folder), "--adapters", *adapters, "--data", str(data), "--batch-size", "2"]
        return main(["train", *fixed, "--output", str(tmp_path / "out"), "--max-steps", str(steps), *more])

    return train


def test_a_training_on_a_full_disk_keeps_the_last_checkpoint_and_model(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(2) == 0
    before = contents(out)
    capsys.readouterr()
    with full_disk():
        assert train(4, "--resume") == 1
    error = capsys.readouterr().err
    assert f"{out} cannot be written:" in error
    assert f"{out}/checkpoints/checkpoint-2 is whole: go on from it with --resume true" in error
    assert "Traceback" not in error
    assert contents(out) == before
    assert train(4, "--resume") == 0
    assert last_checkpoint(out / "checkpoints") == str(out / "checkpoints/checkpoint-4")


def test_a_checkpoint_that_cannot_be_saved_is_named_and_leaves_nothing(train, tmp_path, capsys, monkeypatch):
    import transformers

    def full(trainer, folder):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
    assert train(2) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/out/checkpoints/checkpoint-2 cannot be saved, with " in error
    assert "MiB free: [enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534. There is no check" in error
    assert list((tmp_path / "out/checkpoints").iterdir()) == []
    weft.from_pretrained(tmp_path / "out")  # the model itself is saved


def test_what_deepspeed_cannot_write_fails_alone_and_what_fails_before_it_in_all_processes(tmp_path):
    import transformers

    def fails(reason, *, if_):
        def write():
            written.append(reason)
            if if_:
                raise RuntimeError(reason)

        return write

    for first in (False, True):
        written = []
        trainer = object.__new__(transformers.Trainer)
        trainer.is_deepspeed_enabled = True
        trainer.args = SimpleNamespace(output_dir=str(tmp_path), device=torch.device("cpu"), should_save=True)
        trainer.state = SimpleNamespace(global_step=3)
        trainer._save = fails("of the model", if_=first)
        trainer._save_optimizer_and_scheduler = fails("of DeepSpeed", if_=True)
        trainer._save_checkpoint = lambda: (trainer._save(), trainer._save_optimizer_and_scheduler())  # noqa: B023
        keep_checkpoints_whole(trainer)
        reason = "of the model" if first else "of DeepSpeed"
        with pytest.raises(CheckpointError, match=f"checkpoint-3 cannot be saved, with .*: {reason}") as raised:
            trainer._save_checkpoint()
        assert raised.value.in_all_processes == first
        assert written == ["of the model", "of DeepSpeed"][: 1 if first else 2]


def test_a_half_written_checkpoint_is_passed_over(train, tmp_path):
    checkpoints = tmp_path / "out/checkpoints"
    assert train(2) == 0
    (checkpoints / "checkpoint-9").mkdir()
    (checkpoints / "checkpoint-10").mkdir()
    (checkpoints / "checkpoint-10/trainer_state.json").write_text('{"epo')
    (checkpoints / "checkpoint-best").mkdir()
    assert last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert last_checkpoint(tmp_path / "none") is None
    assert train(3, "--resume") == 0

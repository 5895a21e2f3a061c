"""Saving replaces all or nothing, also on a disk that is full half-way."""

import errno
import json
import os
from contextlib import suppress
from types import SimpleNamespace

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import weft
from disk import contents, full_disk
from models import randomise, tiny_llama
from weft.checkpoint.adapters import local_folder
from weft.cli import main
from weft.errors import CheckpointError, ConfigError
from weft.files import writing
from weft.files.writing import (
    check_file,
    check_folder,
    make_folder,
    replace_file,
    replace_folder,
    settle,
    temporary_folder,
)
from weft.train.checkpoints import last_checkpoint
from weft.train.trainer import WeftTrainer

TOKENS = torch.arange(1, 19).view(2, 9)


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


def kill(monkeypatch, folder, moved):
    """Kill a process that replaces the folder after so many moves."""
    rename = os.rename

    def killed(*paths):
        nonlocal moved
        moved -= 1
        if moved < 0:
            raise SystemExit
        rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("weft.files.writing.os.rename", killed)
        patched.setattr("weft.files.writing._put_in_order", lambda folder: None)
        patched.setattr("weft.files.writing.shutil.rmtree", lambda *args, **kwargs: None)
        with suppress(SystemExit):
            replace_folder(folder, write, "config")


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
    before = contents(folder)
    kill(monkeypatch, folder, moved)
    assert not (folder / "config").exists()  # so that nothing loads a mix of both
    with pytest.raises(ValueError, match="x"):
        replace_folder(folder, lambda part: int("x"), "config")
    assert contents(folder) == before


@pytest.mark.parametrize("moved", range(1, 6))
def test_whoever_reads_a_folder_half_replaced_finds_the_old_entries(moved, folder, monkeypatch):
    before = contents(folder)
    kill(monkeypatch, folder, moved)
    assert local_folder(str(folder), "the folder") == folder
    assert contents(folder) == before


def test_what_a_killed_process_left_in_a_new_folder_goes_and_what_it_completed_stays(folder, tmp_path, monkeypatch):
    new = tmp_path / "new"
    for moved in range(3):
        kill(monkeypatch, new, moved)
        settle(new, leftovers=True)
        assert list(new.iterdir()) == []
    kill(monkeypatch, folder, 7)  # all are in their place, the old ones are not yet removed
    assert (folder / ".old").is_dir()
    settle(folder)
    assert (folder / "config").read_text() == "new"
    settle(folder, leftovers=True)
    assert contents(folder) == {"config": b"new", "data": b"new", "parts/new": b"new", "own": b"old"}


def test_a_folder_that_cannot_be_put_back_says_what_to_do(folder, monkeypatch):
    kill(monkeypatch, folder, 3)

    def refused(*paths):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("weft.files.writing.os.rename", refused)
        with pytest.raises(CheckpointError) as raised:
            local_folder(str(folder), "the folder")
    assert str(raised.value) == (
        f"{folder} was being replaced by a process that was killed, and cannot be put back in order: [Errno 13] "
        f"Permission denied. Make it writable; or, when nobody writes there, move what is in {folder}/.old one level "
        f"up and remove {folder}/.part"
    )
    monkeypatch.setattr("weft.files.writing.fcntl", None)
    with pytest.raises(CheckpointError, match=r"killed, or is at work: this file system has no locks to tell\. When"):
        settle(folder)


def test_a_folder_that_another_process_writes_is_left_to_it(folder, monkeypatch):
    kill(monkeypatch, folder, 3)
    monkeypatch.setattr("weft.files.writing._PATIENCE", 0.1)
    with writing._locked(folder):
        before = contents(folder)
        for access in (settle, lambda folder: replace_folder(folder, write, "config")):
            with pytest.raises(CheckpointError, match="is being written by another process: wait until it is done"):
                access(folder)
        assert contents(folder) == before
    settle(folder)
    assert (folder / "config").read_text() == "old"


def test_nothing_outside_of_the_folder_is_moved_for_it(folder, tmp_path):
    """A folder from elsewhere may say what it likes."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (folder / ".part").mkdir()
    (folder / ".part/config").write_text("new")
    (folder / ".part/.exchange").write_text(json.dumps({"last": "config", "added": ["../outside/mine", "..", ""]}))
    (folder / ".old").symlink_to(outside)
    before = contents(folder)
    settle(folder)
    assert contents(folder) == before
    (folder / ".old").unlink()
    (folder / ".old").mkdir()
    settle(folder)
    assert (outside / "mine").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["config", "data", "own", "parts"]


def test_what_somebody_else_calls_old_is_left_alone(folder):
    (folder / ".old").mkdir()
    (folder / ".old/mine").write_text("mine")
    before = contents(folder)
    settle(folder, leftovers=True)
    with pytest.raises(
        CheckpointError, match=r"cannot be written: .* is not weft's, and in the way: '.*/\.old' \(what"
    ):
        replace_folder(folder, write, "config")
    assert contents(folder) == before


def test_an_undo_that_fails_says_where_the_old_entries_are(folder, monkeypatch):
    before, rename = contents(folder), os.rename
    moves = iter(range(3))

    def full(*paths):
        if next(moves, None) is None:
            raise OSError(28, "No space left on device")
        rename(*paths)

    with monkeypatch.context() as patched:
        patched.setattr("weft.files.writing.os.rename", full)
        with pytest.raises(CheckpointError, match=rf"No space .* \(what was there before is in {folder}/\.old, and"):
            replace_folder(folder, write, "config")
    settle(folder)
    assert contents(folder) == before


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with full_disk(), pytest.raises(CheckpointError) as raised:
        replace_file(file, lambda path: path.write_bytes(b"x" * 4000))
    assert str(raised.value) == (
        f"{file} cannot be written: [Errno 27] File too large (what was there before is unchanged); give another file"
    )
    assert contents(tmp_path) == {"file": b"old"}
    (tmp_path / "file.part").symlink_to(tmp_path / "other")  # left by nobody of weft's
    replace_file(file, lambda path: path.write_text("new"))
    assert contents(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["tokenizers", "torch", "torch too"],
)
def test_whatever_a_library_raises_on_a_full_disk_is_one_error(error, tmp_path):
    def full(path):
        raise error

    for replace, name in ((replace_file, "file"), (lambda *args: replace_folder(*args, "config"), "folder")):
        with pytest.raises(CheckpointError, match=rf"{name} cannot be written: .*\(nothing is left there\)"):
            replace(tmp_path / name, full)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free some space, or give another file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "free some space, or give another file"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "free some space, or give another file"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), "free some space, or give another file"),
        (PermissionError(errno.EACCES, "Permission denied"), "give another file"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "give another file"),
    ],
    ids=str,
)
def test_to_free_some_space_is_said_where_the_disk_may_be_full(error, advice, tmp_path):
    def fail(path):
        raise error

    with pytest.raises(CheckpointError) as raised:
        replace_file(tmp_path / "file", fail)
    assert str(raised.value).endswith(f"cannot be written: {error} (nothing is left there); {advice}")


def test_a_bug_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(TypeError):
        replace_folder(tmp_path / "folder", lambda part: len(3), "config")


def test_what_cannot_be_written_is_found_before(tmp_path):
    (tmp_path / "file").write_text("old")
    for path, reason in (
        ("none/file", f"there is no folder {tmp_path}/none"),
        ("", "Is a directory"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(ConfigError, match=rf"html \({tmp_path}.*\) cannot be written: {reason}; give another file"):
            check_file(tmp_path / path, "html")
    check_file(tmp_path / "file", "html")
    check_file(tmp_path / "new", "html")
    assert contents(tmp_path) == {"file": b"old"}
    for path, reason in (("file/folder", "file is a file, expected a folder"), ("x" * 300, ".*File name too long")):
        with pytest.raises(ConfigError, match=rf"output \({tmp_path}/{path}\) cannot be written: .*{reason}; give ano"):
            check_folder(tmp_path / path, "output")
    check_folder(tmp_path / "a/b", "output")
    with pytest.raises(ConfigError, match=r"/proc( \(No such file or directory\)| is not yours to write in); give ano"):
        check_folder("/proc/a/b", "output")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_full_disk_does_not_refuse_a_folder_that_may_have_space_later(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("weft.files.writing.tempfile.mkdtemp", full)
    check_folder(tmp_path / "a", "output")


def test_several_processes_may_make_a_folder_and_what_a_killed_one_left_goes(tmp_path):
    (tmp_path / "unfinished-1").mkdir()
    (tmp_path / "unfinished-2").mkdir()
    with writing._locked(tmp_path / "unfinished-2"):
        make_folder(tmp_path / "cache", write)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "unfinished-2"]


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


def test_an_adapter_that_cannot_be_folded_leaves_the_one_before(mixture, tmp_path, monkeypatch):
    model = weft.from_pretrained(mixture)
    folded = tmp_path / "folded"
    weft.fold(model, folded, {"math": 1.0})
    before, tensors = contents(folded), load_file(folded / "adapter_model.safetensors")
    with full_disk():
        for output in (folded, tmp_path / "new"):
            with pytest.raises(CheckpointError, match=f"{output.name} cannot be written: .*File too large"):
                weft.fold(model, output, {"math": 0.5})
    assert contents(folded) == before
    assert not (tmp_path / "new").exists()
    for output in (folded, tmp_path / "new"):
        kill(monkeypatch, output, 2)  # of something else: what matters is what it leaves
        weft.fold(model, output, {"math": 1.0})
        assert contents(output)["adapter_config.json"] == before["adapter_config.json"]
        torch.testing.assert_close(load_file(output / "adapter_model.safetensors"), tensors, rtol=0, atol=0)
        assert not (output / ".old").exists()


def test_peft_finds_the_old_files_of_a_mixture_half_replaced(saved, llama_adapters, peft_xlora_restored, monkeypatch):
    _, folder = saved
    before = contents(folder)
    rename = os.rename

    def killed(source, target):
        if source.parent.name == ".part":
            raise SystemExit
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("weft.files.writing.os.rename", killed)
        patched.setattr("weft.files.writing._put_in_order", lambda folder: None)
        with pytest.raises(SystemExit):
            weft.drop_expert(folder, "math", folder)
    assert not (folder / "adapter_config.json").exists()
    weft.register_with_peft()
    peft.PeftModel.from_pretrained(tiny_llama(), folder)
    assert contents(folder) == before
    weft.unregister_from_peft()
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at"):
        peft.PeftModel.from_pretrained(tiny_llama(), folder / "experts")


def test_temporary_files_that_cannot_be_written_are_named(monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(
            CheckpointError, match=r"temporary folder /\S+ cannot be written: .*No space .*; free some space"
        ),
        temporary_folder(full),
    ):
        pass
    with temporary_folder(lambda folder: (folder / "file").write_text("x")) as folder:
        assert (folder / "file").exists()
    assert not folder.exists()


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
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == [".begun"]
    weft.from_pretrained(tmp_path / "out")  # the model itself is saved
    monkeypatch.undo()
    assert train(2) == 0  # anew, as it says
    assert [path.name for path in (tmp_path / "out/checkpoints").iterdir()] == ["checkpoint-2"]


def test_what_deepspeed_cannot_write_fails_alone_and_what_fails_before_it_in_all_processes(tmp_path, monkeypatch):
    import transformers

    def fails(reason, *, if_):
        def write(trainer, *args):
            written.append(reason)
            if if_:
                raise RuntimeError(reason)

        return write

    class Trainer(WeftTrainer):
        is_deepspeed_enabled = True

        def __init__(self):
            self.args = SimpleNamespace(output_dir=str(tmp_path), device=torch.device("cpu"), should_save=True)
            self.state = SimpleNamespace(global_step=3)

    def save(trainer):
        trainer._save("")
        trainer._save_optimizer_and_scheduler("")

    for first in (False, True):
        written = []
        monkeypatch.setattr(transformers.Trainer, "_save", fails("of the model", if_=first))
        monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", fails("of DeepSpeed", if_=True))
        monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
        reason = "of the model" if first else "of DeepSpeed"
        with pytest.raises(CheckpointError, match=f"checkpoint-3 cannot be saved, with .*: {reason}") as raised:
            Trainer()._save_checkpoint()
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

"""The checkpoints of a training: finds complete ones, reports damaged ones, and removes old ones.

transformers' Trainer writes a checkpoint file by file, from all processes, `trainer_state.json` last. Then weft writes
the digests of all files (`weft_checkpoint.json`). A checkpoint that has neither is incomplete and is ignored. If its
files differ from the digests, it was damaged later, which is reported.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.checkpoint.manifest import MANIFEST_NAME, verify
from weft.distributed import deepspeed_is_to_come, process_number
from weft.errors import CheckpointError, ConfigError, first_line
from weft.files.digests import changes, digests
from weft.files.reading import read_json
from weft.files.writing import replace_file
from weft.options.training import BEGUN, CHECKPOINTS, RECORD, is_complete

_FORMAT_VERSION = 1
_KEPT = 2  # checkpoints of a run
# DeepSpeed writes the optimizer into a folder, and the folder's name into a file.
_DEEPSPEED_FOLDERS, _DEEPSPEED_LATEST = "global_step*", "latest"
_PICKLES = (".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints in a folder.

    Attributes:
        last: the newest valid checkpoint: complete and not damaged.
        damaged: damaged checkpoints -> the problem, from the newest to `last`.
        incomplete: all checkpoints that were not completed.
    """

    last: Path | None = None
    damaged: dict[Path, str] = field(default_factory=dict)
    incomplete: list[Path] = field(default_factory=list)

    def passed_over(self) -> list[str]:
        """One line for each checkpoint that is newer than `last`."""
        if self.last is None:
            return []
        step = step_of(self.last)
        incomplete = {path: "it was not completed" for path in self.incomplete if step_of(path) > step}
        reasons = {**self.damaged, **incomplete}
        return [
            f"{path.name} is passed over: {reasons[path]}; going on from {self.last.name}"
            for path in sorted(reasons, key=step_of, reverse=True)
        ]


def checkpoints_folder(output: str) -> Path:
    """The folder of the checkpoints of a training with this output folder."""
    return Path(output) / CHECKPOINTS


def find_checkpoints(folder: Path) -> Checkpoints:
    """Check the checkpoints in a folder, from the newest to the first valid one. All files of these are read."""
    existing = _by_step(folder)
    incomplete = [path for path in existing if is_incomplete(path)]
    damaged: dict[Path, str] = {}
    for path in reversed(existing):
        if path not in incomplete:
            problem = damage(path)
            if problem is None:
                return Checkpoints(path, damaged, incomplete)
            damaged[path] = problem
    return Checkpoints(None, damaged, incomplete)


def last_checkpoint(folder: Path) -> str | None:
    """The newest valid checkpoint in a folder, or None."""
    last = find_checkpoints(folder).last
    return None if last is None else str(last)


def how_to_resume(folder: Path) -> str:
    """The advice for a training that could not save."""
    last = last_checkpoint(folder)
    if last is None:
        return f"There is no checkpoint yet in {folder}: start anew with more space"
    return f"{last} is whole: go on from it with --resume true"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if there is none."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and number.isascii() else -1


def is_incomplete(checkpoint: Path) -> bool:
    """Whether a checkpoint was not completed."""
    return not is_complete(checkpoint)


def damage(checkpoint: Path) -> str | None:
    """The problem with a completed checkpoint, in one line; None if it is valid.

    A valid checkpoint has all files that resuming needs, and no file has changed. Earlier versions wrote no digests:
    then the files must be readable, and the mixture must fit its manifest.
    """
    try:
        problems = _missing(checkpoint) or (
            _changed(checkpoint) if (checkpoint / RECORD).exists() else _unreadable(checkpoint)
        )
    except (CheckpointError, OSError) as err:
        problems = [" ".join(str(err).split())]
    return "; ".join(problems) or None


def write_record(checkpoint: Path) -> None:
    """Write the digests of all files of a checkpoint, which completes it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    files = [file.relative_to(checkpoint) for file in checkpoint.rglob("*") if file.is_file()]
    # Without model cards, which a user may edit, and .part files, which a killed process has left.
    read = [file for file in files if file.suffix not in (".md", ".part") and not file.parts[0].startswith(".")]
    names = [file.as_posix() for file in read if file.name != RECORD]
    record = {"format_version": _FORMAT_VERSION, "files": digests(checkpoint, names)}
    text = json.dumps(record, indent=1)
    replace_file(checkpoint / RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint. It is marked incomplete first, so that files that cannot be removed do no harm."""
    if checkpoint.is_symlink():
        checkpoint.unlink(missing_ok=True)
        return
    (checkpoint / RECORD).unlink(missing_ok=True)
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def remove_old_checkpoints(newest: Path, best: str | None) -> None:
    """Remove all checkpoints except the newest ones and the best one.

    transformers orders checkpoints by date, and would count damaged ones.

    Args:
        newest: the newest checkpoint, which is complete.
        best: the checkpoint with the lowest loss so far, if any.
    """
    before = [path for path in _by_step(newest.parent) if step_of(path) < step_of(newest)]
    others = [path for path in before if best is None or path.name != Path(best).name]
    kept = _KEPT - 1 - (len(before) - len(others))
    with suppress(OSError):  # training can continue
        for path in others[: len(others) - max(kept, 0)]:
            remove_checkpoint(path)
        (newest.parent / BEGUN).unlink(missing_ok=True)


def prepare_folder(folder: Path, checkpoints: Checkpoints) -> None:
    """Create the folder for the checkpoints of a training, and remove incomplete ones from it.

    Raises:
        ConfigError: the folder cannot be created, or one cannot be removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if process_number() == 0:
            for incomplete in checkpoints.incomplete:
                remove_checkpoint(incomplete)
            if checkpoints.last is None:
                (folder / BEGUN).touch()
    except OSError as err:
        raise ConfigError(f"output ({folder.parent}) cannot be made: {err}") from err


def not_saved_error(checkpoint: Path, cause: Exception) -> CheckpointError:
    """The error for a checkpoint that could not be written and was removed."""
    free = ""
    with suppress(OSError):
        free = f", with {shutil.disk_usage(checkpoint.parent).free / 2**20:.1f} MiB free"
    error = CheckpointError(
        f"{checkpoint} cannot be saved{free}: {first_line(cause)}. {how_to_resume(checkpoint.parent)}"
    )
    error.__cause__ = cause
    return error


def best_up_to(checkpoint: Path) -> Path | None:
    """The checkpoint with the lowest loss up to this one, which may be loaded at the end of training; or None."""
    best = read_json(checkpoint / TRAINER_STATE_NAME).get("best_model_checkpoint")
    return checkpoint.parent / Path(best).name if isinstance(best, str) else None


def describe(damaged: dict[Path, str]) -> str:
    """Damaged checkpoints with their problems, for a message."""
    return ", ".join(f"{path.name} ({reason})" for path, reason in damaged.items())


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if step_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=step_of)


def _missing(checkpoint: Path) -> list[str]:
    """One sentence for each file that resuming needs and that is missing."""
    needed = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MANIFEST_NAME, TRAINER_STATE_NAME]
    by_deepspeed = any(checkpoint.glob(_DEEPSPEED_FOLDERS))
    if by_deepspeed != deepspeed_is_to_come() and (by_deepspeed or (checkpoint / OPTIMIZER_NAME).exists()):
        with_or_without = "with" if by_deepspeed else "without"
        return [f"the state of its optimizer was saved {with_or_without} DeepSpeed, which must be used as it was"]
    needed += [_DEEPSPEED_LATEST] if by_deepspeed else [OPTIMIZER_NAME, SCHEDULER_NAME]
    problems = [f"{name} is missing" for name in needed if not (checkpoint / name).is_file()]
    # The number of processes may differ. A process without a file draws other random numbers for dropout.
    if not any(checkpoint.glob("rng_state*.pth")):
        problems.append("rng_state.pth is missing")
    return problems


def _changed(checkpoint: Path) -> list[str]:
    record = read_json(checkpoint / RECORD)
    version = record.get("format_version")
    if version != _FORMAT_VERSION:
        return [f"{RECORD} is of format_version {version!r}, expected {_FORMAT_VERSION}: a newer weft's"]
    return changes(checkpoint, record.get("files"))


def _unreadable(checkpoint: Path) -> list[str]:
    """The problems of a checkpoint without digests."""
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    if state.get("global_step") != step_of(checkpoint):
        return [f"{TRAINER_STATE_NAME} is of step {state.get('global_step')!r}"]
    verify(checkpoint, read_json(checkpoint / CONFIG_NAME))
    pickles = [file for file in sorted(checkpoint.rglob("*")) if file.suffix in _PICKLES and file.is_file()]
    return [f"{file.relative_to(checkpoint).as_posix()} is not whole" for file in pickles if not _is_intact_zip(file)]


def _is_intact_zip(file: Path) -> bool:
    """Whether a file saved by torch is intact, by the checksums of its zip entries."""
    try:
        with zipfile.ZipFile(file) as opened:
            return opened.testzip() is None
    except (OSError, ValueError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile):
        return False

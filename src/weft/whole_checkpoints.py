"""Checkpoints of a training are whole: one that cannot be written leaves no trace, and the earlier ones stay.

transformers' Trainer writes a checkpoint file by file, `trainer_state.json` last.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.adapters import read_json
from weft.errors import CheckpointError, first_line
from weft.processes import any_process, fail_together

# Writes what only DeepSpeed can read, where that is in use.
_OF_DEEPSPEED = "_save_optimizer_and_scheduler"


def last_checkpoint(folder: Path) -> str | None:
    """The latest whole checkpoint in a folder, or None; what a killed process left half-written is passed over."""
    numbered = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.rpartition("-")[2]
        if number.isdecimal() and _is_whole(path):
            numbered[int(number)] = path
    return str(numbered[max(numbered)]) if numbered else None


def keep_checkpoints_whole(trainer: Trainer) -> None:
    """Let a Trainer remove a checkpoint that it could not write (a full disk), and say which one to resume from.

    Its `_save_checkpoint` raises `CheckpointError` then: of several processes in all, whichever could not write.
    """
    _WholeCheckpoints(trainer)


class _WholeCheckpoints:
    """Wraps what a Trainer writes checkpoints with."""

    # Between these some processes wait for others, so that an error must wait for the last one.
    _WRITERS = ("_save", _OF_DEEPSPEED, "_save_scaler", "_save_rng_state")

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._save_checkpoint = trainer._save_checkpoint
        self._failed: Exception | None = None
        for name in self._WRITERS:
            write = getattr(trainer, name)
            if name == _OF_DEEPSPEED and trainer.is_deepspeed_enabled:
                wrapped = partial(self._write_alone, write)
            else:
                wrapped = partial(self._try, write, is_last=name == self._WRITERS[-1])
            setattr(trainer, name, wrapped)
        trainer._save_checkpoint = self._save_whole  # type: ignore[method-assign]

    def _try(self, write: Callable[..., Any], *args: Any, is_last: bool, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except Exception as err:
            self._failed = self._failed or err
        if is_last:
            self._raise_failure()

    def _write_alone(self, write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        # DeepSpeed's processes wait for each other on their way: one that fails there must end, for the others to end.
        self._raise_failure()
        try:
            write(*args, **kwargs)
        except Exception as err:
            raise self._error(err) from err

    def _save_whole(self, *args: Any, **kwargs: Any) -> None:
        self._failed = None
        try:
            self._save_checkpoint(*args, **kwargs)
        except CheckpointError:
            raise  # one of those below
        except Exception as err:
            self._failed = err
        except BaseException:
            self._remove_unless_whole()
            raise
        self._raise_failure()

    def _raise_failure(self) -> None:
        """Raise what went wrong in any process; all come here."""
        device = self._trainer.args.device
        if not any_process(self._failed is not None, device):
            return
        self._remove_unless_whole()  # now that nobody writes any more
        fail_together(None if self._failed is None else self._error(self._failed), device)

    def _error(self, cause: Exception) -> CheckpointError:
        free = shutil.disk_usage(self._folder).free / 2**20
        error = CheckpointError(
            f"{self._checkpoint} cannot be saved, with {free:.1f} MiB free: {first_line(cause)}. "
            f"{how_to_go_on(self._folder)}"
        )
        error.__cause__ = cause
        return error

    def _remove_unless_whole(self) -> None:
        if self._trainer.args.should_save and not _is_whole(self._checkpoint):
            shutil.rmtree(self._checkpoint, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    @property
    def _checkpoint(self) -> Path:
        return self._folder / f"{PREFIX_CHECKPOINT_DIR}-{self._trainer.state.global_step}"


def how_to_go_on(folder: Path) -> str:
    """What to do after a training that could not save."""
    last = last_checkpoint(folder)
    if last is None:
        return f"There is no checkpoint yet in {folder}: start anew with more space"
    return f"{last} is whole: go on from it with --resume true"


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(read_json(checkpoint / "trainer_state.json"))
    except CheckpointError:
        return False

"""Checkpoints of a training are whole: one that cannot be written leaves no trace, and the earlier ones stay.

transformers' Trainer writes a checkpoint file by file, `trainer_state.json` last; weft completes it with the digests of
its files (see `weft.train.checkpoints`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.distributed import any_process, fail_together, process_number
from weft.errors import CheckpointError, ConfigError, first_line
from weft.train.checkpoints import (
    BEGUN,
    RECORD,
    Checkpoints,
    best_before,
    damage,
    is_half,
    last_checkpoint,
    number_of,
    numbered,
    remove_checkpoint,
    write_record,
)

_KEPT = 2  # checkpoints of a run
# Writes what only DeepSpeed can read, where that is in use.
_OF_DEEPSPEED = "_save_optimizer_and_scheduler"


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
            self._by_the_first(remove_checkpoint)  # one of this step that was passed over
            any_process(False, self._trainer.args.device)  # wait for it
            self._save_checkpoint(*args, **kwargs)
            self._by_the_first(write_record)  # it has come here after all have written
            self._by_the_first(self._remove_old)
        except CheckpointError:
            raise  # one of those below
        except Exception as err:
            self._failed = err
        except BaseException:
            self._remove_unless_whole()
            raise
        self._raise_failure()

    def _by_the_first(self, write: Callable[[Path], None]) -> None:
        if self._trainer.args.should_save and self._failed is None:
            try:
                write(self._checkpoint)
            except (OSError, CheckpointError) as err:
                self._failed = self._failed or err

    def _remove_old(self, newest: Path) -> None:
        """Remove all but the newest ones, and the best.

        transformers goes by dates, and would count those that were passed over.
        """
        before = [path for path in numbered(newest.parent) if number_of(path) < number_of(newest)]
        best = self._trainer.state.best_model_checkpoint
        others = [path for path in before if best is None or path.name != Path(best).name]
        kept = _KEPT - 1 - (len(before) - len(others))
        with suppress(OSError):  # which is no reason to stop
            for path in others[: len(others) - max(kept, 0)]:
                remove_checkpoint(path)
            (newest.parent / BEGUN).unlink(missing_ok=True)

    def _raise_failure(self) -> None:
        """Raise what went wrong in any process; all come here."""
        device = self._trainer.args.device
        if not any_process(self._failed is not None, device):
            return
        self._remove_unless_whole()  # now that nobody writes any more
        fail_together(None if self._failed is None else self._error(self._failed), device)

    def _error(self, cause: Exception) -> CheckpointError:
        free = ""
        with suppress(OSError):
            free = f", with {shutil.disk_usage(self._folder).free / 2**20:.1f} MiB free"
        error = CheckpointError(
            f"{self._checkpoint} cannot be saved{free}: {first_line(cause)}. {how_to_go_on(self._folder)}"
        )
        error.__cause__ = cause
        return error

    def _remove_unless_whole(self) -> None:
        if self._trainer.args.should_save and not (self._checkpoint / RECORD).exists():
            with suppress(OSError):
                remove_checkpoint(self._checkpoint)

    @property
    def _folder(self) -> Path:
        return Path(str(self._trainer.args.output_dir))

    @property
    def _checkpoint(self) -> Path:
        return self._folder / f"{PREFIX_CHECKPOINT_DIR}-{self._trainer.state.global_step}"


def make_room(folder: Path, checkpoints: Checkpoints) -> None:
    """Make the folder for the checkpoints of a training, and remove those in it that were not completed.

    Raises:
        ConfigError: that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if process_number() == 0:
            for half in checkpoints.half:
                remove_checkpoint(half)
            if checkpoints.last is None:
                (folder / BEGUN).touch()
    except OSError as err:
        raise ConfigError(f"output ({folder.parent}) cannot be made: {err}") from err


def go_on_from(trainer: Trainer, checkpoints: Checkpoints, say: Callable[[str], None]) -> None:
    """Say which checkpoints a training that goes on from the last whole one passes over.

    Where the best one so far is not whole, the best is chosen from here on.

    Args:
        trainer: of the training.
        checkpoints: of which there is a last one.
        say: told that, a line at a time.
    """
    for line in checkpoints.passed_over():
        say(line)
    assert checkpoints.last is not None
    best = best_before(checkpoints.last)
    if best is None:
        return
    problem = "it was not completed" if is_half(best) else damage(best)
    if not best.is_dir():
        problem = "it is missing"
    if problem is not None:
        start = checkpoints.last.name
        say(f"{best.name}, the best so far, is passed over: {problem}; the best from {start} on is taken")
    trainer.add_callback(_Best(best if problem is None else None))


class _Best(TrainerCallback):
    """Tells a training that goes on where the best checkpoint so far is; None where it is lost."""

    def __init__(self, best: Path | None) -> None:
        self._best = best

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say it."""
        if self._best is None:
            state.best_metric = state.best_global_step = None
        state.best_model_checkpoint = None if self._best is None else str(self._best)


def how_to_go_on(folder: Path) -> str:
    """What to do after a training that could not save."""
    last = last_checkpoint(folder)
    if last is None:
        return f"There is no checkpoint yet in {folder}: start anew with more space"
    return f"{last} is whole: go on from it with --resume true"

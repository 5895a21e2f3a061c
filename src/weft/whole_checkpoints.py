"""Checkpoints of a training are whole: one that cannot be written leaves no trace, and the earlier ones stay.

transformers' Trainer writes a checkpoint file by file, `trainer_state.json` last.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from weft.adapters import read_json
from weft.errors import CheckpointError, first_line


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

    Its `_save_checkpoint` raises `CheckpointError` then.
    """
    save = trainer._save_checkpoint

    def save_whole(*args: Any, **kwargs: Any) -> None:
        folder = Path(str(trainer.args.output_dir))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        try:
            save(*args, **kwargs)
        except BaseException as err:
            if not _is_whole(checkpoint):
                shutil.rmtree(checkpoint, ignore_errors=True)
            if not isinstance(err, Exception):
                raise
            free = shutil.disk_usage(folder).free / 2**20
            raise CheckpointError(
                f"{checkpoint} cannot be saved, with {free:.1f} MiB free: {first_line(err)}. {how_to_go_on(folder)}"
            ) from err

    trainer._save_checkpoint = save_whole  # type: ignore[method-assign]


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

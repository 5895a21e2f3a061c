"""The record of a run's options, models and data in each checkpoint, and the changes of a run that resumes from one.

Base model and adapters are identified by a digest of their weights, and data by a digest of its content, so files can
be moved. A Hub id is identified by its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.trainer import TRAINER_STATE_NAME

from weft.data.labelled import labelled_source
from weft.distributed import deepspeed_is_to_come, number_of_processes
from weft.files.digests import digest_of_file, digest_of_weights
from weft.files.reading import is_whole, read_json
from weft.files.writing import replace_file
from weft.options import TrainOptions
from weft.train.checkpoints import step_of

RUN_RECORD = "weft_run.json"
_FORMAT_VERSION = 1
# Their product is the number of sequences per step.
_PER_STEP = ("batch_size", "gradient_accumulation_steps", "processes")
# They determine the texts of each step.
_ORDER = ("sequence_length", "assistant_only_loss", "packing", "group_by_length", "seed")
_AMOUNT = ("max_steps", "epochs", "max_tokens")
_OTHERS = (
    "learning_rate",
    "global_scaling_weight",
    "warmup_ratio",
    "eval_steps",
    "save_steps",
    "early_stopping",
    "bf16",
    "dtype",
    "quantization",
)
_DATA = ("data", "eval_data")


class Past(NamedTuple):
    """What a run that is resumed has done.

    Attributes:
        done: its last step.
        losses: (step, loss) of each evaluation.
        digest: of the rows that it was evaluated on; None if there were none or if they are not known.
        drawn: digests of those of them that were drawn from its data.
        since: the step after which losses count for its end.
        other_data: the run that resumes it trains on other data.
    """

    done: int
    losses: list[tuple[int, float]]
    digest: str | None = None
    drawn: tuple[str, ...] = ()
    since: int = 0
    other_data: bool = False


def run_record(options: TrainOptions, adapters: dict[str, str]) -> dict[str, Any]:
    """Return the record of a run. Call this after its data was read, as the files must exist."""
    names = [name for name in (*_AMOUNT, *_PER_STEP, *_ORDER, *_OTHERS) if name != "processes"]
    return {
        "format_version": _FORMAT_VERSION,
        "options": {name: getattr(options, name) for name in names} | {"processes": number_of_processes()},
        "base": _model(options.base),
        "adapters": {name: _model(path) for name, path in adapters.items()},
        **{name: {value: _source(value, list(adapters)) for value in getattr(options, name)} for name in _DATA},
    }


def write_run(checkpoint: Path, record: dict[str, Any]) -> None:
    """Write the record into a checkpoint whose other files are written, completely or not at all."""
    text = json.dumps(record, indent=1)
    replace_file(checkpoint / RUN_RECORD, lambda path: path.write_text(text, encoding="utf-8"))


def changes_since(checkpoint: Path, record: dict[str, Any]) -> list[str]:
    """Return one line for each change of a run that resumes from a checkpoint.

    Args:
        checkpoint: the checkpoint; without a record, if an earlier version wrote it, there are no lines.
        record: the record of the run that resumes.

    Raises:
        CheckpointError: the checkpoint's record is broken.
    """
    saved = _read(checkpoint)
    if saved is None:
        return []
    before, now = saved.table("options"), record["options"]
    names = [name for name in now if name in before and before[name] != now[name]]
    if _per_step(before) == _per_step(now):
        names = [name for name in names if name not in _PER_STEP]
    lines = [f"{name}: {before[name]} -> {now[name]}" for name in names]
    data = {name: _data_change(saved.table(name), record[name]) for name in _DATA}
    lines += [f"{name}: {change}" for name, change in data.items() if change]
    if data["data"] or {*names} & {*_PER_STEP, *_ORDER}:
        lines.append("the steps that are done are skipped: until the end of this epoch, texts may repeat or be missed")
    return lines


def past_of(checkpoint: Path, record: dict[str, Any]) -> Past:
    """What the run of a checkpoint has done.

    Args:
        checkpoint: the checkpoint.
        record: the record of the run that resumes.

    Raises:
        CheckpointError: the checkpoint's record is broken.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    past = Past(step_of(checkpoint), evaluations(state.get("log_history") or []))
    saved = _read(checkpoint)
    if saved is None:
        return past
    held_out = saved.table("held_out", {})
    if held_out:
        past = past._replace(
            digest=held_out.string("digest", None),
            drawn=tuple(held_out.strings("drawn", [])),
            since=held_out.whole("since", 0),
        )
    return past._replace(other_data=_data_change(saved.table("data"), record["data"]) is not None)


def evaluations(log_history: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, loss) of each evaluation in the log of a Trainer."""
    return [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]


def refused_changes(checkpoint: Path, options: TrainOptions, adapters: dict[str, str]) -> list[str]:
    """Return one sentence for each reason why a run cannot resume from a checkpoint with these options.

    Raises:
        CheckpointError: a file of the checkpoint is broken.
    """
    done = step_of(checkpoint)
    problems = []
    if 0 < options.max_steps < done:
        problems.append(f"max_steps ({options.max_steps}) must be at least the steps that are done ({done})")
    saved = _read(checkpoint)
    if saved is None:
        return problems
    before = saved.table("options")
    tokens = read_json(checkpoint / TRAINER_STATE_NAME).whole("num_input_tokens_seen", 0)
    if options.max_tokens != before.get("max_tokens") and 0 < options.max_tokens < tokens:
        problems.append(f"max_tokens ({options.max_tokens}) must be at least the tokens that are done ({tokens})")
    if deepspeed_is_to_come() and before.get("learning_rate") != options.learning_rate:
        problems.append(
            f"learning_rate ({options.learning_rate}) must be what the run to resume has "
            f"({before.get('learning_rate')}): DeepSpeed keeps it"
        )
    problems += _other_model("base", options.base, saved.table("base"))
    known = saved.table("adapters")
    for name in adapters.keys() & known.keys():
        problems += _other_model(f"adapter {name!r}", adapters[name], known.table(name))
    return problems


def _read(checkpoint: Path) -> Any:
    file = checkpoint / RUN_RECORD
    if not os.path.lexists(file):
        return None
    saved = read_json(file)
    if saved.get("format_version") != _FORMAT_VERSION:
        raise saved.wrong("format_version", f"{_FORMAT_VERSION}: a newer weft's")
    return saved


def _per_step(options: dict[str, Any]) -> Any:
    values: list[Any] = [options.get(name) for name in _PER_STEP]
    return math.prod(values) if all(map(is_whole, values)) else values


def _model(name: str | None) -> dict[str, Any]:
    """The record of a base model or an adapter."""
    return {"name": name, "digest": digest_of_weights(Path(name)) if name and os.path.isdir(name) else None}


def _source(value: str, expert_names: Sequence[str]) -> dict[str, Any]:
    """The record of a data source."""
    source, expert = labelled_source(value, expert_names)
    digest = digest_of_file(Path(source))["digest"] if os.path.isfile(source) else None
    return {"name": None if digest else source, "digest": digest, "expert": expert}


def _other_model(what: str, name: str | None, saved: Any) -> list[str]:
    """One sentence if this is not the recorded model."""
    named, before, now = saved.string("name", None), saved.string("digest", None), _model(name)["digest"]
    if (before == now) if before and now else (named == name):  # a Hub id has no digest
        return []
    if named == name:
        return [f"{what} ({name}) must be as it was when the checkpoint was saved: its weights have changed since"]
    return [f"{what} ({name}) must be what the run to resume has ({named})"]


def _data_change(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Describe the change of the data, or return None. The keys are the sources as given, the values their records."""
    contents = list(before.values()), list(now.values())
    if contents[0] == contents[1]:
        return None
    gone = [given for given, source in before.items() if source not in contents[1]]
    new = [given for given, source in now.items() if source not in contents[0]]
    if gone == new:
        return f"{', '.join(new)} has changed" if new else "in another order"
    return f"{', '.join(gone) or 'nothing'} -> {', '.join(new) or 'nothing'}"

"""The start of `weft train`: from a mixture, with a fitted gate, or from the last checkpoint."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from weft.checkpoint.base_place import refuse_missing_base
from weft.config import XLoraConfig
from weft.data.labelled import labels_are_complete
from weft.distributed import by_the_first, in_distributed_training, number_of_processes, sharding_is_to_come
from weft.errors import ConfigError, WeftError
from weft.options import TrainOptions
from weft.screen.visible import notice
from weft.train.arguments import MIXTURE_OPTIONS
from weft.train.checkpoints import Checkpoints, best_up_to, damage, is_incomplete, step_of
from weft.train.gate_fit import fit_gate, fit_problems
from weft.train.run_record import changes_since


def with_mixture_options(options: TrainOptions) -> TrainOptions:
    """Return the options with base model, experts and gate options of the mixture to start from.

    Args:
        options: the given options; returned unchanged if `start_from` is None.

    Raises:
        ConfigError: one of these options is given and differs from the mixture's.
        CheckpointError: the mixture cannot be read.
    """
    if options.start_from is None:
        return options
    config = XLoraConfig.from_pretrained(options.start_from)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    own: dict[str, Any] = {name: getattr(config, name) for name in MIXTURE_OPTIONS}
    problems = [
        f"{name} ({getattr(options, name)!r}) must be what the mixture to start from has ({value!r}): leave it out"
        for name, value in own.items()
        if getattr(options, name) not in (value, defaults[name])
    ]
    if options.adapters:
        problems.append(
            f"adapters ({options.adapters}) and start_from ({options.start_from}) exclude each other: the experts are "
            "the mixture's, and weft add-expert adds one"
        )
    if problems:
        raise ConfigError("weft train cannot start:", problems)
    base = options.base or config.base_model_name_or_path
    if not options.base and base is not None and config.folder is not None:
        refuse_missing_base(config.folder, base)
    return dataclasses.replace(options, base=base, adapters=dict(config.adapters or {}), **own)


def start_gate(model: Any, rows: list[dict[str, Any]], options: TrainOptions, device: torch.device) -> None:
    """Fit the gate to the labels or losses of the data, with the same result in all processes.

    If `gate_start` is None, it is fitted to the labels if they are complete, otherwise to the losses; if that is not
    possible, it stays random. With `scaling_pass_rank` it must be possible.
    """
    by, say = options.gate_start, by_the_first(notice)
    if by == "random" or (by is None and options.start_from):
        return
    # Without the fit, the gate's own LoRA in the scaling pass would do nothing.
    left_open = by is None and options.scaling_pass_rank is None
    if by is None:
        by = "labels" if labels_are_complete(rows, model.xlora_config.num_experts) else "losses"
    if left_open and (sharding_is_to_come() or fit_problems(model, by)):
        return
    base = model.get_base_model()
    if not getattr(base, "is_quantized", False) and getattr(base, "hf_device_map", None) is None:
        model.to(device)  # quantised models and those with a device map cannot be moved
    try:
        agreement = fit_gate(model, rows, by, batch_size=options.batch_size, seed=options.seed, announce=say)
    except WeftError as err:
        if not left_open:
            raise
        say(f"the gate starts at random: {err}")
        return
    if in_distributed_training():
        for parameter in model.internal_xlora_classifier.parameters():
            torch.distributed.broadcast(parameter.data, src=0)
    if not math.isnan(agreement):
        say(f"the gate's first choice agrees with the {by} for {agreement:.0%} of the held-out tokens")


def say_resuming(checkpoint: Path, record: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the step from which a training resumes, and the changes since the checkpoint.

    Args:
        checkpoint: the checkpoint from which it resumes.
        record: the present record, from `run_record`.
        say: called with each line.
    """
    lines = changes_since(checkpoint, record)
    say(f"resuming from step {step_of(checkpoint)}{', with changes:' if lines else ''}")
    for line in lines:
        say(f"  {line}")


def check_steps_left(options: TrainOptions, num_rows: int, checkpoint: Path) -> None:
    """Raise if `epochs` ends before the step of the checkpoint to resume from.

    Raises:
        ConfigError: it does.
    """
    if options.max_steps or options.max_tokens:
        return  # these were checked earlier
    per_step = options.batch_size * options.gradient_accumulation_steps * number_of_processes()
    steps, done = math.ceil(options.epochs * math.ceil(num_rows / per_step)), step_of(checkpoint)
    if steps < done:
        raise ConfigError(f"epochs ({options.epochs}) are {steps} steps of this data, fewer than are done ({done})")


def resume_from(
    trainer: Trainer, checkpoints: Checkpoints, say: Callable[[str], None], *, comparable: bool = True
) -> None:
    """Print the checkpoints that are skipped, and restore the best checkpoint so far.

    If the best one is not valid, the best one of the remaining training is used.

    Args:
        trainer: the Trainer that resumes.
        checkpoints: the checkpoints in the output folder; `last` must be set.
        say: called with each line.
        comparable: the losses before are of the same held-out texts; otherwise the best of the remaining training is
            used.
    """
    for line in checkpoints.passed_over():
        say(line)
    assert checkpoints.last is not None
    best = best_up_to(checkpoints.last) if comparable else None
    if best is None:
        trainer.add_callback(_Resumed(None))
        return
    problem = "it was not completed" if is_incomplete(best) else damage(best)
    if not best.is_dir():
        problem = "it is missing"
    if problem is not None:
        start = checkpoints.last.name
        say(f"{best.name}, the best so far, is passed over: {problem}; the best from {start} on is taken")
    trainer.add_callback(_Resumed(best if problem is None else None))


class _Resumed(TrainerCallback):
    """Corrects the state that a training resumes with, in which are the options of the run before.

    Args:
        best: the best checkpoint so far; None if there is none, or if it is lost.
    """

    def __init__(self, best: Path | None) -> None:
        self._best = best

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct it, after the Trainer has loaded it. End the training here if no step is left."""
        state.logging_steps, state.save_steps, state.eval_steps = args.logging_steps, args.save_steps, args.eval_steps
        if self._best is None:
            state.best_metric = state.best_global_step = None
        state.best_model_checkpoint = None if self._best is None else str(self._best)
        control.should_training_stop |= state.global_step >= state.max_steps

"""What `weft train` does beside the steps: evaluation, the best checkpoint, an early stop, reports, gate metrics."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from weft.options import TrainOptions
from weft.train.callbacks import GateCallback


def monitoring_problems(options: TrainOptions) -> list[str]:
    """Everything that is wrong with these options, a sentence each."""
    problems = []
    for name in ("eval_steps", "early_stopping"):
        value = getattr(options, name)
        if value < 0:
            problems.append(f"{name} ({value}) must be at least 0")
        elif value > 0 and not options.eval_data:
            problems.append(f"{name} ({value}) needs eval_data: held-out texts")
    return problems


def monitoring_arguments(options: TrainOptions) -> dict[str, Any]:
    """Arguments for transformers' `TrainingArguments`."""
    arguments: dict[str, Any] = {"report_to": options.report_to, "save_steps": options.save_steps}
    if options.eval_data:
        # A checkpoint for each evaluation, so that the best one is there to be loaded.
        steps = options.eval_steps or options.save_steps
        arguments |= {
            "eval_strategy": "steps",
            "eval_steps": steps,
            "save_steps": steps,
            "per_device_eval_batch_size": options.batch_size,
            "prediction_loss_only": True,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return arguments


def monitoring_callbacks(options: TrainOptions) -> list[TrainerCallback]:
    """The gate's metrics in the log, and the early stop if it was asked for."""
    callbacks: list[TrainerCallback] = [GateCallback()]
    if options.early_stopping:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=options.early_stopping))
    return callbacks

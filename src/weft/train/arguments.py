"""Converts the options of a training to transformers' `TrainingArguments`, steps, and a mixture's options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from weft.base_model.versions import checkpointing_arguments, length_grouping_arguments
from weft.distributed import number_of_processes
from weft.options import TrainOptions

_LEARNING_RATE = 1e-3
# Options that are also in the mixture's config.
MIXTURE_OPTIONS = (
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "softmax_temperature",
    "top_k_lora",
    "global_scaling_weight",
    "scaling_pass_value",
    "scaling_pass_layers",
    "scaling_pass_rank",
    "gate_layer",
    "use_trainable_adapters",
    "allow_dora",
    "balance_loss_weight",
    "entropy_loss_weight",
    "expert_label_loss_weight",
)


def mixture_options(options: TrainOptions) -> dict[str, Any]:
    """The options of a new mixture, for its config."""
    given = {name: getattr(options, name) for name in MIXTURE_OPTIONS}
    weight = given["global_scaling_weight"]
    return {**given, "global_scaling_weight": 1.0 if weight is None else weight}


def steps_to_train(options: TrainOptions, num_rows: int, tokens_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps: (expected number, maximum). The maximum 0 means that `epochs` ends the training."""
    per_step = options.batch_size * options.gradient_accumulation_steps * number_of_processes()
    if options.max_tokens:
        expected, most = budget_in_steps(options.max_tokens, tokens_per_epoch, -(-num_rows // per_step))
        limit = options.max_steps or most
        return min(expected, limit), min(most, limit)
    expected = options.max_steps or max(1, int(options.epochs * max(1, num_rows // per_step)))
    return expected, options.max_steps


def budget_in_steps(max_tokens: int, tokens_per_epoch: int, steps_per_epoch: int) -> tuple[int, int]:
    """Optimizer steps for a budget of tokens: (expected number, maximum)."""
    expected = -(-max_tokens * steps_per_epoch // tokens_per_epoch)
    return expected, -(-max_tokens // tokens_per_epoch) * steps_per_epoch


def training_arguments(
    options: TrainOptions,
    folder: Path,
    schedule_steps: int,
    most_steps: int,
    *,
    schedule: str = "cosine",
    evaluates: bool = False,
) -> TrainingArguments:
    """The Trainer's arguments for a run.

    Args:
        options: the options of the run.
        folder: folder for the checkpoints.
        schedule_steps: number of optimizer steps in the learning rate schedule.
        most_steps: maximum number of optimizer steps; 0 if `epochs` ends the training.
        schedule: the Trainer's name of the learning rate schedule.
        evaluates: whether there are held-out texts to evaluate on.
    """
    return TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=most_steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=_LEARNING_RATE if options.learning_rate is None else options.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=int(options.warmup_ratio * schedule_steps),
        weight_decay=0.0,
        seed=options.seed,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,  # WeftTrainer stops at such a loss
        report_to=options.report_to,
        **checkpointing_arguments({"use_reentrant": False} if options.gradient_checkpointing else None),
        bf16=options.bf16,
        **length_grouping_arguments(options.group_by_length),
        remove_unused_columns=False,
        disable_tqdm=True,
        **_evaluation_arguments(options, evaluates=evaluates),
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
    )


def _evaluation_arguments(options: TrainOptions, *, evaluates: bool) -> dict[str, Any]:
    if not evaluates:
        return {"save_steps": options.save_steps}
    # A checkpoint for each evaluation, so that the best one can be loaded.
    steps = options.eval_steps or options.save_steps
    return {
        "eval_strategy": "steps",
        "eval_steps": steps,
        "eval_on_start": not options.resume,  # a fitted gate may be the best one
        "save_steps": steps,
        "per_device_eval_batch_size": options.batch_size,
        "prediction_loss_only": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }

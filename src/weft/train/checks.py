"""What is wrong with the options of a training, before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from weft.config import XLoraConfig
from weft.distributed import sharding_is_to_come
from weft.errors import ConfigError
from weft.files.ownership import used_folder_problem
from weft.files.reading import read_json
from weft.files.writing import folder_problem, settle
from weft.options import TrainOptions
from weft.train.arguments import mixture_options
from weft.train.checkpoints import BEGUN, Checkpoints, checkpoints_folder, describe, find_checkpoints
from weft.train.reports import report_problems
from weft.train.run_record import refused_changes

# What a run leaves in its output folder before there is a checkpoint.
_OF_A_RUN = {"checkpoints", "scaling-cache"}


def check(options: TrainOptions, adapters: dict[str, str]) -> Checkpoints:
    """Say what is wrong with the options of a gate's training.

    Returns:
        The checkpoints in the output folder.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems = replace(options, start_from=None, experts_from=[]).missing()  # which have been looked into
    if options.experts_from:
        problems.append(f"experts_from ({options.experts_from}) needs weft.train.experts.train_in_stages")
    for name in ("batch_size", "gradient_accumulation_steps", "save_steps", "logging_steps"):
        if getattr(options, name) < 1:
            problems.append(f"{name} ({getattr(options, name)}) must be at least 1")
    if options.max_steps < 0:
        problems.append(f"max_steps ({options.max_steps}) must be at least 0")
    if options.learning_rate <= 0:
        problems.append(f"learning_rate ({options.learning_rate}) must be above 0")
    if not 0 <= options.warmup_ratio <= 1:
        problems.append(f"warmup_ratio ({options.warmup_ratio}) must be in [0, 1]")
    problems += _start_problems(options)
    problems += _evaluation_problems(options)
    problems += _amount_problems(options)
    problems += report_problems(options.report_to)
    checkpoints = find_checkpoints(checkpoints_folder(options.output))
    problems += _output_problems(options, checkpoints)
    problems += _resume_problems(options, adapters, checkpoints)
    if problems:
        raise ConfigError("weft train cannot start:", problems)
    XLoraConfig(adapters=adapters, **mixture_options(options))
    return checkpoints


def check_experts(options: TrainOptions) -> None:
    """Say what is wrong with the options of the experts' training.

    Raises:
        ConfigError: with all that is wrong.
    """
    problems = [
        f"{name} ({getattr(options, name)}) must be at least 1"
        for name in ("expert_rank", "expert_alpha")
        if getattr(options, name) < 1
    ]
    if options.expert_steps < 0:
        problems.append(f"expert_steps ({options.expert_steps}) must be at least 0")
    if options.expert_steps == 0 and options.expert_epochs <= 0:
        problems.append(f"expert_epochs ({options.expert_epochs}) must be above 0")
    if options.expert_learning_rate <= 0:
        problems.append(f"expert_learning_rate ({options.expert_learning_rate}) must be above 0")
    if not options.expert_targets:
        problems.append("expert_targets is empty: names of modules, or all-linear")
    if options.start_from is not None:
        problems.append(
            f"experts_from ({options.experts_from}) and start_from ({options.start_from}) exclude each other: weft "
            "add-expert adds an expert to a mixture"
        )
    if problems:
        raise ConfigError("weft train cannot train experts:", problems)


def _start_problems(options: TrainOptions) -> list[str]:
    """Why the gate cannot start as these options say."""
    if options.gate_start in (None, "random"):
        return []
    what = f"gate_start ({options.gate_start})"
    if options.start_from is not None:
        return [f"{what} and start_from ({options.start_from}) exclude each other: that mixture's gate goes on"]
    if sharding_is_to_come():
        return [
            f"{what} needs the whole model in each process, not shards: train without FSDP or DeepSpeed, or from a "
            "mixture whose gate was fitted (weft.fit_gate), with start_from"
        ]
    return []


def _evaluation_problems(options: TrainOptions) -> list[str]:
    problems = []
    for name in ("eval_steps", "early_stopping"):
        value = getattr(options, name)
        if value < 0:
            problems.append(f"{name} ({value}) must be at least 0")
        elif value > 0 and not options.eval_data:
            problems.append(f"{name} ({value}) needs eval_data: held-out texts")
    return problems


def _amount_problems(options: TrainOptions) -> list[str]:
    """How long to train, and how to make batches."""
    problems = []
    if options.max_tokens < 0:
        problems.append(f"max_tokens ({options.max_tokens}) must be at least 0")
    if options.packing and options.group_by_length:
        problems.append("packing (True) and group_by_length (True) exclude each other: packed sequences are all long")
    if options.max_steps == options.max_tokens == 0 and options.epochs <= 0:
        problems.append(f"epochs ({options.epochs}) must be above 0")
    return problems


def _output_problems(options: TrainOptions, checkpoints: Checkpoints) -> list[str]:
    output = Path(options.output)
    problem = folder_problem(output)
    if problem is not None:
        return [f"output ({options.output}) cannot be made: {problem}"]
    settle(output, leftovers=True)
    begun = (checkpoints_folder(options.output) / BEGUN).exists()
    if checkpoints.last is not None or checkpoints.damaged or begun:  # a run's, whose files may be replaced
        return []
    problem = used_folder_problem(output, "output", own=_OF_A_RUN)
    return [] if problem is None else [problem]


def _resume_problems(options: TrainOptions, adapters: dict[str, str], checkpoints: Checkpoints) -> list[str]:
    """A run must neither continue another one nor mix its checkpoints with another's."""
    folder = checkpoints_folder(options.output)
    last, damaged = checkpoints.last, checkpoints.damaged
    if not options.resume:
        if last is not None:
            return [f"output ({options.output}) holds the checkpoints of a run: give another folder, or --resume true"]
        if damaged:
            return [
                f"output ({options.output}) holds checkpoints that no run can go on from: {describe(damaged)}; give "
                f"another folder, or remove {options.output}"
            ]
        return []
    if last is None and damaged:
        return [
            f"resume (True) found no whole checkpoint in {folder}: {describe(damaged)}; leave it out, and give another "
            f"folder or remove {options.output}"
        ]
    if last is None:
        only = ", only what was not completed and does not count" if checkpoints.incomplete else ""
        return [f"resume (True) found no checkpoint in {folder}{only}: leave it out to start anew"]
    saved = read_json(last / CONFIG_NAME)
    given = XLoraConfig(adapters=dict.fromkeys(adapters, "-"), **mixture_options(options))
    names = mixture_options(options)
    wanted: dict[str, Any] = {"expert_names": list(adapters), **{name: getattr(given, name) for name in names}}
    problems = [
        f"{name} ({value!r}) must be what the run to resume has ({saved.get(name)!r})"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    return problems + refused_changes(last, options, adapters)

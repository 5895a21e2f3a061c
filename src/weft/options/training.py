"""Checks of the options of `weft train` before anything is loaded. Each returns one sentence per problem."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from weft.errors import CheckpointError
from weft.files.names import split_name
from weft.files.ownership import used_folder_problem
from weft.files.reading import naming_problem, path_shown, read_json
from weft.files.writing import folder_problem, settle
from weft.options.checks import least, length_problems, naming_problems, pairs
from weft.options.ranges import range_problems, routing_problems
from weft.options.values import words_with_commas

CHECKPOINTS = "checkpoints"  # in the output folder
RECORD, STATE = "weft_checkpoint.json", "trainer_state.json"  # in a checkpoint: weft's and transformers' last files
# A file in the folder of the checkpoints until one is complete: the output of such a run may be overwritten.
BEGUN = ".begun"
# Folders in the output folder that a run writes before its first checkpoint.
RUN_FOLDERS = {CHECKPOINTS, "scaling-cache"}


def expert_problems(options: Any) -> list[str]:
    """Problems of the experts' names and number."""
    problems = naming_problems(options.adapters, "adapters")
    problems += naming_problems(options.experts_from, "experts_from", "name=DATA")
    given, trained = (
        [name for name, _ in pairs(values) if name] for values in (options.adapters, options.experts_from)
    )
    twice = sorted({*given} & {*trained})
    if twice:
        problems.append(f"adapters and experts_from both name {twice}: each expert has one origin")
    if not problems and not options.start_from and not words_with_commas(options):
        problems += number_problems([*given, *trained], "adapters and experts_from name")
    return problems


def unknown_expert_problems(values: Sequence[str], expert_names: Sequence[str]) -> list[str]:
    """One sentence for each NAME=FILE of the data in which the name is none of the experts'."""
    named = [(value, *split_name(value)) for value in values if not os.path.lexists(value)]
    return [
        f"data ({value}) is for {name!r}, which is none of the experts ({', '.join(expert_names)})"
        for value, name, source in named
        if expert_names and name and name not in expert_names and os.path.isfile(source)
    ]


def number_problems(names: list[str], which: str) -> list[str]:
    """The problem of a single expert, as a gate needs several. (No expert at all is found as a missing option.)"""
    if len(names) != 1:
        return []
    return [
        f"{which} one expert ({names[0]}), expected two or more, between which a gate can choose: add another one, or "
        "use this one with peft, without a gate"
    ]


def gate_problems(options: Any) -> list[str]:
    """Problems of the gate's training."""
    problems = least(options, batch_size=1, gradient_accumulation_steps=1, save_steps=1, logging_steps=1)
    problems += least(options, max_steps=0, max_tokens=0, eval_steps=0, early_stopping=0)
    problems += length_problems(options.sequence_length)
    if options.learning_rate is not None and options.learning_rate <= 0:
        problems.append(f"learning_rate ({options.learning_rate}) must be above 0")
    if not 0 <= options.warmup_ratio <= 1:
        problems.append(f"warmup_ratio ({options.warmup_ratio}) must be in [0, 1]")
    if options.start_from and options.gate_start not in (None, "random"):
        problems.append(
            f"gate_start ({options.gate_start}) and start_from ({options.start_from}) exclude each other: the gate "
            "of that mixture is trained further"
        )
    if options.scaling_pass_rank is not None and options.gate_start == "random" and not options.start_from:
        problems.append(
            f"scaling_pass_rank ({options.scaling_pass_rank}) and gate_start (random) exclude each other: the fit of "
            "the gate trains that LoRA, and at random it would do nothing"
        )
    # A training that ends at a plateau holds some texts out.
    for name in () if options.ends_at_a_plateau else ("eval_steps", "early_stopping"):
        if getattr(options, name) > 0 and not options.eval_data:
            problems.append(f"{name} ({getattr(options, name)}) needs eval_data: held-out texts")
    if options.packing and options.group_by_length:
        problems.append("packing (True) and group_by_length (True) exclude each other: packed sequences are all long")
    if options.epochs < 0:
        problems.append(f"epochs ({options.epochs}) must be at least 0")
    return problems


def mixture_problems(options: Any, expert_names: list[str]) -> list[str]:
    """Problems of the mixture's own options, with the messages of `XLoraConfig`."""
    others = {"hidden_size": None, "scalings_log_size": 1, "enable_softmax": True, "enable_softmax_topk": False}
    values = SimpleNamespace(**{**others, **vars(options), "adapters": dict.fromkeys(expert_names, "-")})
    if values.scaling_pass_value is None:
        values.scaling_pass_value = 0.0
    if values.global_scaling_weight is None:
        values.global_scaling_weight = 1.0
    return [*range_problems(values), *routing_problems(values)]


def own_training_problems(options: Any) -> list[str]:
    """Problems of the experts' training."""
    problems = least(options, expert_rank=1, expert_alpha=1, expert_steps=0)
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
    return problems


def output_problems(options: Any) -> list[str]:
    """Problems of the folders to write. Whether a run can resume from its checkpoints is examined later."""
    output = Path(options.output)
    folders = {"output": options.output}
    # An existing cache folder may be read only, with all that is needed in it.
    if options.cache_scaling_pass and options.cache_folder is not None and not os.path.isdir(options.cache_folder):
        folders["cache_folder"] = options.cache_folder
    problems = [
        f"{name} ({path_shown(folder)}) cannot be made: {problem}; give another folder"
        for name, folder in folders.items()
        if (problem := naming_problem(folder) or folder_problem(folder)) is not None
    ]
    if problems:
        return problems
    if not options.dry_run:
        settle(output, leftovers=True)
    if (found := checkpoints_of(options)) and not options.resume and any(map(is_complete, found)):
        return [f"output ({options.output}) holds the checkpoints of a run: give another folder, or --resume true"]
    if found:
        return []
    if options.resume and not options.experts_from:
        return [f"resume (True) found no checkpoint in {output / CHECKPOINTS}: leave it out to start anew"]
    if (output / CHECKPOINTS / BEGUN).exists():
        return []
    problem = used_folder_problem(output, "output", own=RUN_FOLDERS)
    return [] if problem is None else [problem]


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was completed. It may have been damaged later, see `weft.train.checkpoints`."""
    if (checkpoint / RECORD).exists():
        return True
    try:
        read_json(checkpoint / STATE)
    except (CheckpointError, OSError):  # perhaps another process is removing it
        return False
    return True


def checkpoints_of(options: Any) -> list[Path]:
    """The checkpoints in the output folder, complete or not."""
    folder = Path(options.output, CHECKPOINTS)
    return list(folder.glob("checkpoint-*")) if os.path.isdir(folder) else []

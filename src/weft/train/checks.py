"""Checks of a training's options that read checkpoints, mixtures or the Hub.

Checks that read no files are done first, in `weft.options.foreseen`.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME

from weft.base_model.loading import load_tokenizer
from weft.checkpoint.adapters import local_folder
from weft.config import XLoraConfig
from weft.distributed import sharding_is_to_come
from weft.errors import CheckpointError, ConfigError
from weft.files.names import by_name
from weft.files.ownership import used_folder_problem
from weft.files.reading import read_json, shown
from weft.options import TrainOptions
from weft.options.training import BEGUN, RUN_FOLDERS, number_problems
from weft.train.arguments import mixture_options
from weft.train.checkpoints import Checkpoints, checkpoints_folder, describe, find_checkpoints
from weft.train.reports import report_problems
from weft.train.run_record import refused_changes


def check(options: TrainOptions, adapters: dict[str, str]) -> Checkpoints:
    """Raise if the gate cannot be trained with these options. Call this after `refuse_foreseen`.

    Returns:
        The checkpoints in the output folder.

    Raises:
        ConfigError: with all problems.
    """
    # start_from and experts_from were already replaced by what they give.
    problems = replace(options, start_from=None, experts_from=[]).missing()
    problems += number_problems(list(adapters), f"start_from ({options.start_from}) has")
    problems += _start_problems(options)
    problems += report_problems(options.report_to)
    checkpoints = find_checkpoints(checkpoints_folder(options.output))
    problems += _output_problems(options, checkpoints)
    problems += _resume_problems(options, adapters, checkpoints)
    if problems:
        raise ConfigError("weft train cannot start:", problems)
    XLoraConfig(adapters=adapters, **mixture_options(options))
    return checkpoints


def doubts(options: TrainOptions) -> list[str]:
    """One sentence for each option that has no effect as another one is not given, and each adapter with two names."""
    useless = {} if options.cache_scaling_pass else dict.fromkeys(("cache_dtype", "cache_folder"), "cache_scaling_pass")
    own = ("rank", "alpha", "targets", "steps", "epochs", "learning_rate")
    useless |= {} if options.experts_from else {f"expert_{name}": "experts_from" for name in own}
    if options.xlora_depth == 1:
        useless["xlora_size"] = "an xlora_depth of 2 or more"
    default = TrainOptions()
    lines = [
        f"{name} ({shown(getattr(options, name))}) has no effect without {needed}"
        for name, needed in useless.items()
        if getattr(options, name) != getattr(default, name)
    ]
    first: dict[str, str] = {}
    for name, path in by_name(options.adapters, "adapters").items():
        if (other := first.setdefault(os.path.realpath(path), name)) != name:
            lines.append(f"adapters {other} and {name} are the same ({path}): the gate cannot choose between them")
    return lines


def open_sources(options: TrainOptions, adapters: dict[str, str]) -> Any:
    """Load the tokenizer of the base model, and find or download the adapters.

    Raises:
        ConfigError: with all files that cannot be found.
    """
    assert options.base is not None
    problems, tokenizer = [], None
    try:
        tokenizer = load_tokenizer(options.base, trust_remote_code=options.trust_remote_code)
    except CheckpointError as err:
        problems.append(str(err))
    for name, path in adapters.items():
        try:
            local_folder(path, f"adapter {name!r}")
        except CheckpointError as err:
            problems.append(str(err))
    if problems:
        raise ConfigError("weft train cannot start:", problems)
    return tokenizer


def _start_problems(options: TrainOptions) -> list[str]:
    """Options that need a fit of the gate, where it is not possible."""
    if options.start_from is not None or not sharding_is_to_come():
        return []
    given = {"gate_start": options.gate_start, "scaling_pass_rank": options.scaling_pass_rank}
    return [
        f"{name} ({value}) needs the whole model in each process, not shards: train without FSDP or DeepSpeed, or from "
        "a mixture whose gate was fitted (weft.fit_gate), with start_from"
        for name, value in given.items()
        if value not in (None, "random")
    ]


def _output_problems(options: TrainOptions, checkpoints: Checkpoints) -> list[str]:
    """Problems of an output folder without a complete checkpoint."""
    begun = (checkpoints_folder(options.output) / BEGUN).exists()
    if checkpoints.last is not None or checkpoints.damaged or begun:  # the output of a run, which may be replaced
        return []
    problem = used_folder_problem(Path(options.output), "output", own=RUN_FOLDERS)
    return [] if problem is None else [problem]


def _resume_problems(options: TrainOptions, adapters: dict[str, str], checkpoints: Checkpoints) -> list[str]:
    """Problems with resuming."""
    folder = checkpoints_folder(options.output)
    last, damaged = checkpoints.last, checkpoints.damaged
    if not options.resume:  # then there are none of another run, see `refuse_foreseen`
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
    if options.global_scaling_weight is None:
        names.pop("global_scaling_weight")  # the run continues with that of the checkpoint
    wanted: dict[str, Any] = {"expert_names": list(adapters), **{name: getattr(given, name) for name in names}}
    problems = [
        f"{name} ({value!r}) must be what the run to resume has ({saved.get(name)!r})"
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    return problems + refused_changes(last, options, adapters)

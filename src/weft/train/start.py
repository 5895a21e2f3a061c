"""Where `weft train` starts: from a mixture, with its experts, gate and options, or with a gate that is fitted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch

from weft.config import XLoraConfig
from weft.distributed import by_the_first, in_distributed_training, sharding_is_to_come
from weft.errors import ConfigError, WeftError
from weft.options import TrainOptions
from weft.train.gate_fit import fit_gate, fit_problems


def continued(options: TrainOptions, names: Iterable[str]) -> TrainOptions:
    """The options with the base model, the experts and the gate's options of the mixture to start from.

    Args:
        options: as given; they come back as they are where `start_from` is None.
        names: the options that are the mixture's.

    Raises:
        ConfigError: one of them is given and is another one than the mixture's.
        CheckpointError: the mixture cannot be read.
    """
    if options.start_from is None:
        return options
    config = XLoraConfig.from_pretrained(options.start_from)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    own: dict[str, Any] = {name: getattr(config, name) for name in names}
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
    return dataclasses.replace(options, base=base, adapters=dict(config.adapters or {}), **own)


def start_problems(options: TrainOptions) -> list[str]:
    """Why the gate cannot start as these options say, a sentence each."""
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


def start_gate(model: Any, rows: list[dict[str, Any]], options: TrainOptions, device: torch.device) -> None:
    """Fit the gate to the labels or losses of the data; in all processes alike.

    Where the options leave it open, by the losses, and where that cannot be done, not at all.
    """
    by, say = options.gate_start or "losses", by_the_first(print)
    left_open = options.gate_start is None
    if by == "random" or (left_open and (options.start_from or sharding_is_to_come() or fit_problems(model, by))):
        return
    base = model.get_base_model()
    if not getattr(base, "is_quantized", False) and getattr(base, "hf_device_map", None) is None:
        model.to(device)  # quantised and spread models are where they stay
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
        say(f"the gate's first choice is theirs in {agreement:.0%} of the tokens that were kept aside")

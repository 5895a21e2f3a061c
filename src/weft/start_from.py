"""`weft train --start-from`: a training that goes on from a mixture, so with its experts, its gate and its options."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from weft.checkpoint import read_config
from weft.errors import ConfigError
from weft.options import TrainOptions


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
    config = read_config(options.start_from)
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

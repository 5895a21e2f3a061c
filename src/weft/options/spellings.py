"""Other names of options: the Trainer's names if weft has a shorter one, and names before 0.1.0."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

# The Trainer's name -> weft's shorter name.
TRAINERS = {
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "early_stopping_patience": "early_stopping",
}
# Name before 0.1.0 -> present name. Accepted until 0.2.
EARLIER = {
    "log_steps": "logging_steps",
    "warmup": "warmup_ratio",
    "gradient_accumulation": "gradient_accumulation_steps",
    "licence": "license",
}


def current_name(name: str, names: Collection[str]) -> str:
    """The present name of an option, if a command has an option of that name; else `name`."""
    today = {**TRAINERS, **EARLIER}.get(name, name)
    return today if today in names else name


def by_current_names(options_class: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Rename keyword arguments of a dataclass of options to the names of its fields.

    Raises:
        TypeError: an option is given under two names.

    Warns:
        FutureWarning: an option is given under a name before 0.1.0.
    """
    names = {field.name for field in dataclasses.fields(options_class)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        today = current_name(name, names)
        if today in values or (today != name and today in given):
            raise TypeError(f"{options_class.__name__} has {today} twice, once as {name}: give it once")
        if name in EARLIER and today != name:
            warnings.warn(f"the option {name} is called {today} now", FutureWarning, stacklevel=3)
        values[today] = value
    return values

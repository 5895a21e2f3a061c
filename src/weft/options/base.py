"""What the dataclasses of the commands' options have in common: `~` in a path is the home folder.

A shell replaces it at the start of a word only: not in name=~/folder, and nobody does in a YAML file or in Python.
"""

from __future__ import annotations

import os
from typing import Any, Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]

_PATHS = (
    *("model", "source", "base", "adapters", "start_from", "output", "cache_folder", "evaluation", "html", "figure"),
    *("data", "eval_data", "search_data", "experts_from", "compare", "expert"),
)


class CommandOptions:
    """What each of those dataclasses begins with."""

    def __post_init__(self) -> None:
        for name in _PATHS:
            if hasattr(self, name):
                setattr(self, name, _expanded(getattr(self, name)))


def _expanded(value: Any) -> Any:
    """Paths, or pairs name=PATH, alone, in a list or as the values of a table."""
    if isinstance(value, list):
        return [_expanded(one) for one in value]
    if isinstance(value, dict):
        return {name: _expanded(one) for name, one in value.items()}
    if not isinstance(value, str):
        return value
    name, equals, path = value.partition("=")
    if equals and path.startswith("~"):
        return f"{name}={os.path.expanduser(path)}"
    return os.path.expanduser(value)

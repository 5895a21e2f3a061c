"""Base classes of the commands' options: paths with `~`, other spellings, shared options.

`~` is expanded here, as a shell expands it only at the start of a word: not in name=~/folder, YAML files or Python.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

from weft.options.spellings import by_current_names

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
CacheDtype = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["nf4", "int8"]

_PATHS = (
    *("model", "source", "base", "adapters", "start_from", "output", "cache_folder", "evaluation", "html", "figure"),
    *("data", "eval_data", "search_data", "experts_from", "compare", "expert"),
)


class _AcceptsOtherNames(type):
    """Accepts options under the names of earlier versions and of transformers."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **by_current_names(cls, kwargs))


class CommandOptions(metaclass=_AcceptsOtherNames):
    """Base class of the options of each command."""

    def __post_init__(self) -> None:
        for name in _PATHS:
            if hasattr(self, name):
                setattr(self, name, _expanded(getattr(self, name)))

    # `foreseen` calls these before anything is imported or loaded. Problems are sentences.

    def missing(self) -> list[str]:
        """Required options that are missing."""
        return []

    def wrong(self) -> list[str]:
        """Values out of range, and options that exclude each other."""
        return []

    def models(self) -> list[tuple[str, str]]:
        """Models, mixtures and adapters: (what it is, folder or Hub id)."""
        return []

    def sources(self) -> list[tuple[str, str]]:
        """Texts to read: (option, source)."""
        return []

    def in_the_way(self) -> list[str]:
        """Outputs that cannot be written."""
        return []


@dataclass
class MixtureOptions(CommandOptions):
    """Options of a command that takes a mixture.

    Args:
        model: Folder or Hub id of a trained mixture.
    """

    model: str

    def models(self) -> list[tuple[str, str]]:
        """The mixture."""
        return [("model", self.model), *super().models()]


@dataclass(kw_only=True)
class BaseModelOptions(CommandOptions):
    """Options of a command that reads the base model of a mixture.

    Args: Advanced
        base (MODEL): Folder or Hub id of the base model. Default: the one that the mixture names.
        trust_remote_code: Run the Python code that comes with the base model. Without it, a base model that needs such
            code is refused.
    """

    base: str | None = None
    trust_remote_code: bool = False

    def models(self) -> list[tuple[str, str]]:
        """The base model, if given."""
        return [*([("base", self.base)] if self.base else []), *super().models()]


@dataclass(kw_only=True)
class LoadingOptions(BaseModelOptions):
    """Options of a command that computes with the base model.

    Args: Advanced
        dtype: Number format of the base model; auto takes the one it is saved in.
        quantization: Quantise the base model while it is loaded, with bitsandbytes. Default: none.
    """

    dtype: Dtype = "auto"
    quantization: Quantization | None = None


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

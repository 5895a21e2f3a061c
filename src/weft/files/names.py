"""Valid names of experts, and values that are given as name=VALUE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from weft.errors import ConfigError
from weft.files.reading import shown

T = TypeVar("T")
FOLDERS = "name=FOLDER or name=HUB_ID"
NO_EXPERT = "__base__"  # peft's name for the base model in adapter_names
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_LONGEST_NAME = 200  # file names have at most 255 bytes, and other layouts append a suffix


def name_problems(names: Iterable[Any]) -> list[str]:
    """One sentence for each name that an expert cannot have. Names become folders and keys of a ModuleDict.

    Names that were read from a file must be checked with this before they are used.
    """
    from torch import nn  # here, as options are read without it

    problems, reserved = [], dir(nn.ModuleDict())
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"adapters has the name {shown(name)}: names are letters, digits, '_' and '-'")
        elif len(name) > _LONGEST_NAME:
            problems.append(f"adapters has the name {shown(name)}, expected at most {_LONGEST_NAME} characters")
        elif name == NO_EXPERT:
            problems.append(f"adapters has the name {name!r}, which stands for no expert in adapter_names")
        elif name in reserved:
            problems.append(f"adapters has the name {name!r}, which torch.nn.ModuleDict reserves: choose another one")
    return problems


def split_name(value: str) -> tuple[str | None, str]:
    """("math", "DIR") for "math=DIR"; (None, value) for a value without a name."""
    name, equals, rest = value.partition("=")
    return (name, rest) if equals else (None, value)


def by_name(
    values: list[str] | dict[str, T],
    option: str,
    expected: str = FOLDERS,
    read: Callable[[str], Any] = str,
) -> dict[str, T]:
    """{"math": read("DIR")} for ["math=DIR", ...]. A dict is returned unchanged.

    Args:
        values: the values of the option.
        option: the name of the option, for messages.
        expected: the form of an entry, for messages.
        read: converts the text to a value, or raises a ValueError.

    Raises:
        ConfigError: an entry does not have the expected form, or a name occurs twice.
    """
    if isinstance(values, dict):
        return values
    found: dict[str, Any] = {}
    for value in values:
        name, text = split_name(value)
        wrong = f"{option} has the entry {value!r}, expected {expected}"
        if not name or not text:
            raise ConfigError(wrong)
        if name in found:
            raise ConfigError(f"{option} has the name {name!r} twice ({found[name]} and {text})")
        try:
            found[name] = read(text)
        except ValueError as err:
            raise ConfigError(wrong) from err
    return found

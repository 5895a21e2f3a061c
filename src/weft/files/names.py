"""Which names experts can have, and what is given by name: name=VALUE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from weft.errors import ConfigError
from weft.files.reading import shown

T = TypeVar("T")
NO_EXPERT = "__base__"  # peft's, in adapter_names
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_LONGEST_NAME = 200  # of a file's 255, as other layouts put something behind it


def name_problems(names: Iterable[Any]) -> list[str]:
    """A sentence for each name that no expert can have; names become folders, and attributes of a ModuleDict.

    Whoever reads names from a file asks this before anything is done with them.
    """
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
    """ "math=DIR" as ("math", "DIR"); without a name as (None, value)."""
    name, equals, rest = value.partition("=")
    return (name, rest) if equals else (None, value)


def by_name(
    values: list[str] | dict[str, T],
    option: str,
    expected: str = "name=FOLDER or name=HUB_ID",
    read: Callable[[str], Any] = str,
) -> dict[str, T]:
    """["math=DIR", ...] as {"math": read("DIR")}; a table as it is.

    Args:
        values: of the option.
        option: its name, for messages.
        expected: an entry's form, for messages.
        read: gives the value; where it cannot be one, a ValueError.

    Raises:
        ConfigError: an entry is not as expected, or a name stands twice.
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

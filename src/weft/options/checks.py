"""Checks of options that several commands share. Each returns one sentence per problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.errors import ConfigError
from weft.files.names import FOLDERS, by_name, split_name
from weft.files.reading import path_shown
from weft.files.writing import file_problem


def pairs(values: list[str] | dict[str, Any]) -> list[tuple[str | None, str]]:
    """Split name=VALUE, ... into pairs (name, value), unchecked; the name is None if it is missing."""
    if isinstance(values, dict):
        return list(values.items())
    return [split_name(value) for value in values]


def naming_problems(
    values: list[str] | dict[str, Any], option: str, expected: str = FOLDERS, read: Callable[[str], Any] = str
) -> list[str]:
    """The problem with an option's values name=VALUE, if any; see `by_name`."""
    try:
        by_name(values, option, expected, read)
    except ConfigError as err:
        return [str(err)]
    return []


def source_of(value: str) -> str:
    """The source in name=SOURCE. A "=" inside of a path does not separate a name."""
    name, source = split_name(value)
    return value if name is None or "/" in name else source


def files_in_the_way(*files: tuple[str, str | None]) -> list[str]:
    """One sentence for each (option, file) whose file cannot be written."""
    found = [(name, file, file_problem(file)) for name, file in files if file is not None]
    return [
        f"{name} ({path_shown(file)}) cannot be written: {problem}; give another file"
        for name, file, problem in found
        if problem is not None
    ]


def least(options: Any, **smallest: int) -> list[str]:
    """One sentence for each of these options that is below its smallest value."""
    return [
        f"{name} ({getattr(options, name)}) must be at least {value}"
        for name, value in smallest.items()
        if getattr(options, name) < value
    ]


def length_problems(sequence_length: int) -> list[str]:
    """The problem with a number of tokens per sequence, if any."""
    if sequence_length >= 2:
        return []
    return [f"sequence_length ({sequence_length}) must be at least 2: one token to read, one to predict"]

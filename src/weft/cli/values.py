"""Parses one value of an option, from the command line or a YAML file, into the option's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from weft.files.reading import is_list_of_strings, is_number, shown
from weft.options.described import Option

# The values of a switch, as in YAML 1.1.
SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_EXPECTED = {"whole": "a whole number", "number": "a number", "switch": "true or false", "text": "a text"}


def from_words(option: Option, value: str | list[str], name: str | None = None) -> Any:
    """Parse a value from the command line: one word, or the words of a list.

    Args:
        option: the option.
        value: its value.
        name: what an error calls the option; by default as on the command line.

    Raises:
        ValueError: it is not a value of this option, which the message names.
    """
    if isinstance(value, list):
        return value
    if option.optional and value == "null":
        return None
    readers: dict[str, Callable[[str], Any]] = {"whole": int, "number": float, "switch": _switch}
    try:
        found = readers.get(option.kind, str)(value)
    except (ValueError, KeyError):
        raise _error(option, value, name or option.flag) from None
    if option.kind == "choice" and found not in option.choices:
        raise _error(option, value, name or option.flag)
    return found


def from_yaml(option: Option, value: Any) -> Any:
    """Convert a value from YAML: from a file, or a list or table on the command line.

    Raises:
        ValueError: it is not a value of this option, which the message names.
    """
    if value is None and option.optional:
        return None
    if option.kind == "list":
        return _list(option, value)
    if option.kind == "number" and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _error(option, value) from None
    if isinstance(value, str):  # it may be a number in quotes
        return value if option.kind == "text" else from_words(option, value, option.name)
    if type(value) is {"whole": int, "number": float, "switch": bool}.get(option.kind):
        return value
    raise _error(option, value)


def _switch(text: str) -> bool:
    return SWITCH[text.lower()]


def _list(option: Option, value: Any) -> Any:
    if isinstance(value, str):
        return [value]
    if is_list_of_strings(value):
        return value
    if isinstance(value, dict) and option.table is not None and all(isinstance(name, str) for name in value):
        if all(isinstance(one, str) for one in value.values()) and option.table is str:
            return value
        if option.table is float and all(is_number(one) for one in value.values()):
            return {name: float(one) for name, one in value.items()}
    # name=FILE, as other tables are written.
    if isinstance(value, dict) and "FILE" in option.metavar and is_list_of_strings([*value, *value.values()]):
        return [f"{name}={file}" for name, file in value.items()]
    raise _error(option, value)


def _error(option: Option, value: Any, name: str | None = None) -> ValueError:
    expected = _EXPECTED.get(option.kind) or f"one of {', '.join(option.choices)}"
    if option.kind == "list":
        item = option.metavar.removesuffix(" ...")
        expected = f"a list of texts, {item} each" + (", or a table {name: value}" if option.table else "")
    elif option.kind == "text" and not isinstance(value, str):
        expected = "a text: put it into quotes"
    return ValueError(f"{name or option.name} ({shown(value)}) must be {expected}")

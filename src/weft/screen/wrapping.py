"""Breaks messages into lines that fit a terminal, at spaces only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

_MARKER = re.compile(r" *(?:- )?")  # an indentation, or what is before the text of a list's item
_PHRASE = r"(?:[^ ]| (?=[^ ]))+"  # messages have two spaces before a command, and none in it
_WORD = "[^ ]+"
_DEFAULT = 80  # columns of a terminal that does not tell how many it has


def columns_of(stream: Any) -> int:
    """The columns of the terminal that a stream writes to, or COLUMNS; without limit if it is no terminal."""
    if not (hasattr(stream, "isatty") and stream.isatty()):
        return sys.maxsize
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    with suppress(AttributeError, OSError, ValueError):
        return os.get_terminal_size(stream.fileno()).columns or _DEFAULT
    return _DEFAULT


def wrapped(text: str, width: int, together: Iterable[str] = ()) -> str:
    """The text with line breaks instead of spaces where a line is longer than `width`.

    A word that is longer is a line of its own. A command after two spaces is not broken if it fits in a line. Lines
    that continue an item of a list are indented as its text.

    Args:
        text: one or more lines.
        width: columns of the terminal.
        together: names with spaces in them, at which a line is broken only if the name is longer than a line.
    """
    if len(text) * 2 <= width:  # no character takes more than two columns
        return text
    names = [re.escape(name) for name in sorted(together, key=len, reverse=True) if " " in name]
    kinds = (_PHRASE, f"(?:{'|'.join([*names, '[^ ]'])})+", _WORD)
    return "\n".join(line for given in text.split("\n") for line in _lines(given, width, kinds))


def _lines(text: str, width: int, kinds: Sequence[str]) -> list[str]:
    if _cells(text) <= width:
        return [text]
    marker = _MARKER.match(text)
    before = marker[0] if marker else ""
    lines = [before]
    for gap, unit in _units(text[len(before) :], width - len(before), kinds):
        longer = f"{lines[-1]}{gap}{unit}"
        if len(lines[-1]) > len(before) and _cells(longer) > width:
            lines.append(" " * len(before) + unit)
        else:
            lines[-1] = longer
    return lines


def _units(text: str, width: int, kinds: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(spaces, what is not broken) of a text: of the first kind that fits in `width` columns, else a word."""
    for gap, unit in re.findall(f"( *)({kinds[0]})", text):
        if len(kinds) == 1 or _cells(unit) <= width:
            yield gap, unit
        else:
            yield from _units(gap + unit, width, kinds[1:])


def _cells(text: str) -> int:
    """The columns that a text takes on a terminal."""
    from rich.cells import cell_len  # not at the top: the list of commands is read where rich is not installed

    return cell_len(text)

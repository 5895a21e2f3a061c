"""Tables on a screen of any width: columns that do not fit side by side are printed below."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from weft.screen.console import VisibleConsole

_UNLIMITED = 100_000  # width of a pipe or file
_FRAME = 4  # what a table of one column is wider than its texts


def results_console() -> VisibleConsole:
    """A console with the terminal's width; of unlimited width if the output is no terminal."""
    console = VisibleConsole()
    return console if console.is_terminal else VisibleConsole(width=_UNLIMITED)


def print_table(table: Table, console: VisibleConsole) -> None:
    """Print a table in blocks of as many columns as fit. Each block begins with the first column.

    The first column has at most half of the width, and more if the block leaves room. Longer texts in it, and in a
    column that is too wide for a block, are broken at spaces, a longer name after one of - _ . / if it has them.
    """
    for block in _blocks(table, console):
        console.print(block)


def _blocks(table: Table, console: VisibleConsole) -> Iterator[Table]:
    half = max(1, console.width // 2)
    title, taken = table.title, [0]
    for number in range(1, len(table.columns)):
        if len(taken) > 1 and _width(_part(table, [*taken, number], half), console) > console.width:
            yield _fitted(table, taken, console, title)
            title, taken = None, [0]
        taken.append(number)
    yield _fitted(table, taken, console, title)


def _fitted(table: Table, numbers: Sequence[int], console: VisibleConsole, title: object) -> Table:
    """A table of these columns, whose first one is narrower than its texts if the table would not fit otherwise."""
    first, whole = (_width(_part(table, some), console) for some in (numbers[:1], numbers))
    most = first - _FRAME - max(0, whole - console.width)
    return _part(table, numbers, max(1, console.width // 2, most), title)


def _width(table: Table, console: VisibleConsole) -> int:
    """The width of a table on the screen if no text is wrapped."""
    return console.measure(table, options=console.options.update(max_width=_UNLIMITED)).maximum


def _part(table: Table, numbers: Sequence[int], most: int | None = None, title: object = None) -> Table:
    """A table of only these columns, whose first one has at most `most` columns of the screen."""
    part = Table(title=title)  # type: ignore[arg-type]
    columns = [table.columns[number] for number in numbers]
    for number, column in zip(numbers, columns, strict=True):
        part.add_column(
            _Cell(column.header),
            justify=column.justify,
            header_style=column.header_style,
            overflow="fold",
            max_width=None if number else most,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*map(_Cell, cells))
    return part


class _Cell:
    """A text of a table, in which a name that is wider than the column is broken after a separator.

    Args:
        content: text of rich, or a string with its markup.
    """

    def __init__(self, content: Any) -> None:
        self._content = content

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._content)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        text = self._content
        if isinstance(text, str):
            text = console.render_str(text, markup=options.markup, highlight=options.highlight)
        yield Text("\n").join(text.divide(_breaks(text.plain, options.max_width)))


def _breaks(text: str, width: int) -> list[int]:
    """Where to break the words of a text that are wider than `width`; rich breaks it at spaces, too."""
    places = []
    for found in re.finditer(r"\S+", text):
        start, word = found.start(), found[0]
        while len(word) > 1 and cell_len(word) > width:
            fits = max(1, sum(used <= width for used in accumulate(map(cell_len, word))))
            parts = re.match(r".+[-_./]", word[:fits])
            used = len(parts[0]) if parts else fits
            start, word = start + used, word[used:]
            places.append(start)
    return places

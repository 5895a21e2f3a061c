"""Tables on a screen of any width: columns that do not fit side by side are printed below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from weft.screen.console import VisibleConsole

_UNLIMITED = 100_000  # width of a pipe or file


def results_console() -> VisibleConsole:
    """A console with the terminal's width; of unlimited width if the output is no terminal."""
    console = VisibleConsole()
    return console if console.is_terminal else VisibleConsole(width=_UNLIMITED)


def print_table(table: Table, console: VisibleConsole) -> None:
    """Print a table in blocks of as many columns as fit. Each block begins with the first column.

    The first column has at most half of the width. Longer texts in it, and in a column that is too wide for a block,
    are wrapped, at spaces if there are any.
    """
    for block in _blocks(table, console):
        console.print(block)


def _blocks(table: Table, console: VisibleConsole) -> Iterator[Table]:
    title, taken = table.title, [0]
    for number in range(1, len(table.columns)):
        if len(taken) > 1 and _width(_part(table, [*taken, number], console), console) > console.width:
            yield _part(table, taken, console, title)
            title, taken = None, [0]
        taken.append(number)
    yield _part(table, taken, console, title)


def _width(table: Table, console: VisibleConsole) -> int:
    """The width of a table on the screen if no text is wrapped."""
    return console.measure(table, options=console.options.update(max_width=_UNLIMITED)).maximum


def _part(table: Table, numbers: Sequence[int], console: VisibleConsole, title: object = None) -> Table:
    """A table of only these columns."""
    part = Table(title=title)  # type: ignore[arg-type]
    columns = [table.columns[number] for number in numbers]
    for number, column in zip(numbers, columns, strict=True):
        part.add_column(
            column.header,
            justify=column.justify,
            header_style=column.header_style,
            overflow="fold",
            max_width=None if number else max(1, console.width // 2),
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        part.add_row(*cells)
    return part

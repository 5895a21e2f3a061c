"""Tables on a screen of any width: what does not fit beside each other comes below, and no cell is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from weft.screen.console import VisibleConsole

_ENDLESS = 100_000  # columns of a pipe or file


def results_console() -> VisibleConsole:
    """A console as wide as the terminal; without one as wide as what is printed, so that all lines are whole."""
    console = VisibleConsole()
    return console if console.is_terminal else VisibleConsole(width=_ENDLESS)


def print_table(table: Table, console: VisibleConsole) -> None:
    """Print a table in blocks of as many columns as fit, each beginning with the first column.

    The first column takes at most half of the width. Its texts, and a column that is too wide for a block of its own,
    are continued on further lines, at spaces where there are any.
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
    """How many columns of the screen a table takes if nothing in it is broken."""
    return console.measure(table, options=console.options.update(max_width=_ENDLESS)).maximum


def _part(table: Table, numbers: Sequence[int], console: VisibleConsole, title: object = None) -> Table:
    """These columns of a table."""
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

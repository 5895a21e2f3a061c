"""Rows from tables of comma- or tab-separated values, whose first line names the columns.

Read with Python's csv, as pandas guesses types, and would read some texts as numbers or missing values.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weft.errors import DataError
from weft.files.reading import shown


def table_rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row of a table with a column "text". An empty cell of another column is None.

    Args:
        path: path of the file, for messages.
        text: content of the file.
        delimiter: "," or a tab.

    Raises:
        DataError: there is no such column, a row has too few or too many cells, or quotes are not closed.
    """
    lines = _cells(path, text, delimiter)
    if not lines:
        return
    columns = [name.strip() for name in lines[0][1]]
    if columns.count("text") != 1:
        raise DataError(f'data ({path}) has the columns {shown(columns)}, expected one named "text"')
    for number, cells in lines[1:]:
        place = f"{path}, line {number}"
        if len(cells) != len(columns):
            raise DataError(f"{place}: found {len(cells)} cells, expected {len(columns)}, one for each column")
        yield place, {name: cell if cell or name == "text" else None for name, cell in zip(columns, cells, strict=True)}


def _cells(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The cells of each row that is not empty, with the number of its first line."""
    lines, number = [], 1
    before = csv.field_size_limit(max(1, len(text)))  # csv's default is 131,072 characters
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            if cells:
                lines.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as err:
        raise DataError(f"{path}, line {number}: no table that can be read ({err})") from err
    finally:
        csv.field_size_limit(before)
    return lines

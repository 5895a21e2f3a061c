"""A table fits the screen: in blocks of columns, of which no cell is broken; in a pipe it is whole."""

import io
import re

import pytest
from rich.table import Table
from rich.text import Text

from weft.screen.console import VisibleConsole
from weft.screen.tables import print_table, results_console


def table(columns, first="only the-expert-of-licences"):
    made = Table(title="shares")
    made.add_column("")
    for number in range(columns):
        made.add_column(f"expert-{number}\nperplexity", justify="right")
    for name in ("base", first):
        made.add_row(name, *(f"{number}.25 ±0.01" for number in range(columns)))
    return made


def printed(made, width=80):
    screen = io.StringIO()
    print_table(made, VisibleConsole(file=screen, force_terminal=True, color_system=None, width=width))
    return screen.getvalue()


def test_what_fits_is_one_block():
    shown = printed(table(3))
    assert len(re.findall("^│ base ", shown, flags=re.M)) == 1
    assert max(map(len, shown.splitlines())) <= 80


def test_more_columns_come_in_blocks_that_begin_with_the_first():
    shown = printed(table(32))
    assert max(map(len, shown.splitlines())) <= 80
    rows = re.findall("^│ base .*$", shown, flags=re.M)
    assert len(rows) == len(re.findall("^│ only the-expert-of-licences ", shown, flags=re.M)) == 11
    assert re.findall(r"(\d+)\.25 ±0\.01 │", "".join(rows)) == [str(number) for number in range(32)]
    assert re.findall(r"expert-(\d+) ", shown) == [str(number) for number in range(32)]
    assert shown.count("shares") == 1


def test_a_long_name_leaves_half_of_the_screen_to_the_numbers():
    shown = printed(table(4, first=f"only {'x' * 60}"))
    assert max(map(len, shown.splitlines())) <= 80
    assert re.findall(r"(\d)\.25 ±0\.01 │", shown) == ["0", "1", "0", "1", "2", "3", "2", "3"]
    assert shown.count("│ only  ") == 2  # broken at the space
    assert shown.count("x") == 2 * 60 + 4 * "expert perplexity".count("x")


def test_a_name_longer_than_half_of_the_screen_is_whole_where_there_is_room():
    name = "only the-expert-of-licences-with-a-long-name-x"
    assert len(name) == 46
    shown = printed(table(2, first=name))
    assert f"│ {name} │ 0.25 ±0.01 │ 1.25 ±0.01 │" in shown
    shown = printed(table(2, first=f"{name}-of-texts"))  # too long by 4
    assert max(map(len, shown.splitlines())) == 80
    assert re.findall("^│ (only|the-.*?) +│", shown, flags=re.M) == ["only", f"{name.removeprefix('only ')}-of-texts"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("the-expert-of-law-texts", ["the-expert-of-", "law-texts"]),
        ("the_expert.of/law texts", ["the_expert.of/", "law texts"]),
        ("the expert-of-law-texts", ["the", "expert-of-law-", "texts"]),
        ("the-expert-of-lawlawlawlawlaw", ["the-expert-of-", "lawlawlawlawla", "w"]),
        ("-lawlawlawlawlaw", ["-lawlawlawlawl", "aw"]),
        ("数据-数据数据-数据", ["数据-数据数据-", "数据"]),
    ],
)
def test_a_name_that_must_be_broken_is_broken_after_a_separator(name, parts):
    made = Table()
    made.add_column("")
    made.add_column(f"{name}\nppl", justify="right")
    made.add_row(Text(name, "red"), f"[bold]{name}[/bold]")
    shown = printed(made, width=35)
    cells = [[cell.strip() for cell in line[1:-1].split(line[0])] for line in shown.splitlines() if line[0] in "│┃"]
    head, rows = cells[: len(parts) + 1], cells[len(parts) + 1 :]
    assert [left for left, _ in rows] == [right for _, right in rows] == parts
    assert [right for _, right in head] == [*parts, "ppl"]


def test_nothing_is_lost_of_a_column_that_is_too_wide():
    made = Table()
    made.add_column("expert")
    made.add_column("share")
    made.add_column("strongest in")
    name = "base_model.model.encoder.layers.31.self_attn.q_proj_with_a_long_name"
    made.add_row("code", "50.0%", f"{name} (0.75)")
    shown = printed(made, width=60)
    assert max(map(len, shown.splitlines())) <= 60
    assert "│ code   │ 50.0% │" in shown
    assert "│ base_model.model.encoder.layers.31.self_attn.q_ │" in shown
    assert f"{name}(0.75)" in re.sub(r"│ (code)?|[\s│]", "", shown)


def test_a_pipe_gets_every_row_in_one_line(capsys):
    print_table(table(32), results_console())
    (row,) = re.findall("^│ base .*$", capsys.readouterr().out, flags=re.M)
    assert row.count("±0.01") == 32

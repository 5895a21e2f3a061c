"""A table fits the screen: in blocks of columns, of which no cell is broken; in a pipe it is whole."""

import io
import re

from rich.table import Table

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
    assert f"{name}(0.75)" in re.sub(r"│ (code)?|[\s│]", "", shown)


def test_a_pipe_gets_every_row_in_one_line(capsys):
    print_table(table(32), results_console())
    (row,) = re.findall("^│ base .*$", capsys.readouterr().out, flags=re.M)
    assert row.count("±0.01") == 32

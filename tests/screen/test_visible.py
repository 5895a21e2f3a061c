"""Names that others chose are seen on the terminal, and steer nothing."""

import io
import json

import pytest
from rich.table import Table

from weft.cli import main
from weft.screen.console import VisibleConsole
from weft.screen.visible import say, shortened, visible

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\u202ec\x9bd\ud83de"


def test_every_character_is_seen():
    assert visible(HOSTILE) == "a\u241b[2J\u241b]0;title\u2407b\ufffdc\ufffdd\ufffde"
    assert visible("tab\tand\nline \u00e9 \u4e2d \U0001f600") == "tab\tand\nline \u00e9 \u4e2d \U0001f600"
    assert shortened("x" * 200) == "x" * 200
    assert shortened("x" * 200_000) == "x" * 199 + "\u2026"


def test_a_console_shows_its_own_styles_and_no_others():
    console = VisibleConsole(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=60)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE, header_style="red")
    table.add_row("[bold]" + HOSTILE + "[/bold]")
    console.print(table)
    console.print(HOSTILE, markup=False, highlight=False)
    shown = console.file.getvalue()
    assert "\x1b[1;31m" in shown
    for steering in ("\x1b[2J", "\x1b]0;", "\x07", "\u202e", "\x9b", "\ud83d"):
        assert steering not in shown


def test_messages_are_printed_whatever_is_in_them(capsys):
    say(HOSTILE)
    assert capsys.readouterr().out == visible(HOSTILE) + "\n"


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_names_of_data_sets_and_files_reach_the_terminal_harmless(command, mixture, tmp_path, capsys):
    name = "x\x1b[31my\u202ez"
    file = tmp_path / f"{name}.jsonl"
    file.write_text(json.dumps({"text": "one two three"}) + "\n")
    options = ["--rows", "base", "weft"] if command == "eval" else ["--title", name]
    assert main([command, mixture, "--data", str(file), f"b={file}", *options]) == 0
    assert main([command, mixture, "--data", f"{name}=/nowhere.jsonl{name}"]) == 1
    shown = "".join(capsys.readouterr())
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert "x\u241b[31my\ufffdz" in shown

"""On a terminal no word of a message is broken; in a pipe a message is one line."""

import io
import re
import sys

import pytest

from terminals import Terminal, widths
from weft.screen.visible import say
from weft.screen.wrapping import columns_of, wrapped

FOLDER = f"/home/user/{'a-folder-with-a-long-name/' * 4}"


class Screen(io.StringIO):
    """A terminal of unknown width."""

    def isatty(self):
        return True


def test_lines_are_broken_at_spaces_only():
    text = "fitting the gate to the losses of 32,768 tokens, with --scaling-pass-layers 4"
    assert wrapped(text, len(text)) == text
    assert wrapped(text, 40) == ("fitting the gate to the losses of 32,768\ntokens, with --scaling-pass-layers 4")
    assert wrapped(text, 15).split() == text.split()
    assert max(map(len, wrapped(text, 21).splitlines())) <= 21


def test_a_longer_word_is_a_line_of_its_own():
    assert wrapped(f"saved to {FOLDER}: try it", 30) == f"saved to\n{FOLDER}:\ntry it"


def test_lines_stay_lines_and_items_of_a_list_are_indented():
    text = f"there are problems:\n  - one is that a word is missing\n  - {FOLDER} is gone\n\n  a b  c"
    assert wrapped(text, 20) == (
        f"there are problems:\n  - one is that a\n    word is missing\n  - {FOLDER}\n    is gone\n\n  a b  c"
    )


def test_a_command_after_two_spaces_is_whole_if_it_fits_in_a_line():
    text = "saved to the/folder: try  weft generate the/folder --prompt '...'"
    assert wrapped(text, 50) == "saved to the/folder: try\nweft generate the/folder --prompt '...'"
    assert wrapped(text, 35) == "saved to the/folder: try  weft\ngenerate the/folder --prompt '...'"


def test_names_with_spaces_are_kept_together():
    names = ["weft", "only py", "only py-10", "a name that is longer than a line"]
    text = "worse: only py, only py-10; a name that is longer than a line"
    assert wrapped(text, 22, names) == "worse: only py,\nonly py-10; a name\nthat is longer than a\nline"
    assert wrapped(text, 22) == "worse: only py, only\npy-10; a name that is\nlonger than a line"


def test_wide_characters_count_twice():
    assert wrapped("数据 文件 不在", 9) == "数据 文件\n不在"


@pytest.mark.parametrize(("named", "columns"), [("30", 30), ("0", 80), ("wide", 80), (None, 80)])
def test_a_terminal_without_a_width_has_80_columns_unless_COLUMNS_says_otherwise(named, columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if named is not None:
        monkeypatch.setenv("COLUMNS", named)
    assert columns_of(Screen()) == columns
    assert columns_of(io.StringIO()) == sys.maxsize
    assert columns_of(None) == sys.maxsize


def test_a_message_in_a_pipe_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    say("word " * 100)
    assert capsys.readouterr().out == "word " * 100 + "\n"
    screen = Screen()
    say("word " * 5, screen)
    assert screen.getvalue() == "word word word word\nword\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_message_fits_the_terminal_that_it_goes_to():
    code = (
        "import sys; from weft.screen.visible import say; say('a word ' * 50); say('more-' * 10 + ' ' + 'a\\x1b ' * 50)"
    )
    with Terminal("-c", code, columns=60) as terminal:
        assert terminal.end() == 0
    assert 55 <= max(widths(terminal.shown)) <= 60
    assert re.sub(r"\s+", " ", terminal.shown) == "a word " * 50 + "more-" * 10 + " " + "a␛ " * 50

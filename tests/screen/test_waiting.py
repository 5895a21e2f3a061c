"""Something is on the screen while nobody can say how long it takes, and is gone afterwards."""

import io
import time

import pytest

from weft.screen import waiting as waits
from weft.screen.loudness import QUIET, VERBOSE, loudness
from weft.screen.waiting import waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """Begins to be the standard error, which pytest sets anew between a fixture and its test."""

    def begin():
        screen = Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        return screen

    return begin


def test_a_terminal_has_a_line_at_once_that_is_erased(terminal):
    screen = terminal()
    with waiting("loading a\x1b[2Jmodel"):
        assert screen.getvalue() == "loading a␛[2Jmodel ..."
    assert screen.getvalue() == "loading a␛[2Jmodel ...\r\x1b[K"


def test_the_line_is_erased_after_an_error_too_and_is_one_line(terminal):
    screen = terminal()
    with pytest.raises(ValueError, match="so"), waiting("x" * 500):
        raise ValueError("so")
    assert screen.getvalue() == "x" * 70 + " ...\r\x1b[K"


def short_and_long(monkeypatch):
    with waiting("reading texts"):
        pass
    monkeypatch.setattr(waits, "LONG", 0.01)
    with waiting("loading a model"):
        time.sleep(0.2)


def test_a_pipe_has_a_line_only_where_it_takes_long(monkeypatch, capsys):
    short_and_long(monkeypatch)
    assert capsys.readouterr().err == "loading a model ...\n"


def test_so_has_a_terminal_on_which_the_libraries_write_meanwhile(monkeypatch, terminal):
    screen = terminal()
    with loudness(VERBOSE):
        short_and_long(monkeypatch)
    assert screen.getvalue() == "loading a model ...\n"


def test_hidden_or_quiet_says_nothing(terminal):
    screen = terminal()
    with waiting("loading", hidden=True):
        pass
    with loudness(QUIET), waiting("loading"):
        pass
    assert screen.getvalue() == ""

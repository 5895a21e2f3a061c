"""The time left is on the screen: as a bar on a terminal, and in a log as a line now and then."""

import io
import re

import pytest

from weft.screen import countdown
from weft.screen.console import VisibleConsole
from weft.screen.countdown import Countdown, clock


@pytest.fixture
def now(monkeypatch):
    """A clock that the test turns."""
    time = [0.0]
    monkeypatch.setattr(countdown.time, "monotonic", lambda: time[0])
    return time


def run(now, total, **options):
    with Countdown(total, "reading", **options) as shown:
        for step in range(1, 7):
            now[0] += 4
            shown.advance(10, "writing" if step == 5 else None)


def test_without_a_terminal_there_is_a_line_every_ten_seconds(now, capsys):
    run(now, 60)
    assert capsys.readouterr().out == "reading: 30/60, 0:00:12 left\nwriting: 60/60, 0:00:00 left\n"


def test_where_nobody_knows_how_much_there_is_no_time_left(now, capsys):
    run(now, None)
    assert capsys.readouterr().out == "reading: 30\nwriting: 60\n"


def test_what_is_quick_or_hidden_says_nothing(now, capsys):
    with Countdown(2, "reading") as shown:
        shown.advance()
    run(now, 60, hidden=True)
    assert capsys.readouterr().out == ""


def test_before_the_first_step_nobody_knows_how_long_it_takes(now, capsys):
    with Countdown(2) as shown:
        now[0] += 20
        shown.advance(0, "only code: law")
    assert capsys.readouterr().out == "only code: law: 0/2\n"


def test_on_a_terminal_there_is_a_bar(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        countdown,
        "VisibleConsole",
        lambda **options: VisibleConsole(file=screen, force_terminal=True, width=80, **options),
    )
    with Countdown(4, "reading [all]") as shown:
        shown.advance(2)
        shown._bar.refresh()
    assert re.search(r"reading \[all\] .*━", screen.getvalue())
    assert shown._bar.finished is False
    assert clock(3725.4) == "1:02:05"

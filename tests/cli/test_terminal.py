"""What the terminal shows of a stream: the model's text as it is, in the experts' colours."""

import io
import re

import pytest
from rich.console import Console

from weft.cli.terminal import StepPrinter, style_of
from weft.generation.stream import Step

ORANGE, BLUE, END = "\x1b[38;2;230;159;0m", "\x1b[38;2;86;180;233m", "\x1b[0m"


def on_terminal(printer, width=80):
    printer.console = Console(
        file=io.StringIO(), force_terminal=True, color_system="truecolor", width=width, soft_wrap=True
    )
    return printer


def shown(printer):
    return printer.console.file.getvalue()


def test_pieces_have_the_colour_of_their_leading_expert():
    printer = on_terminal(StepPrinter(["math", "code"], show_experts=True))
    printer.legend()
    printer.add(Step(1, "one", {"math": 0.8, "code": 0.2}))
    printer.add(Step(2, " two", {"math": 0.4, "code": 0.6}))
    printer.add(Step(3, " none", {}))
    assert shown(printer) == f"experts:  {ORANGE}math{END}  {BLUE}code{END}\n{ORANGE}one{END}{BLUE} two{END} none"


def test_the_end_says_the_mean_shares_of_this_text_alone():
    printer = StepPrinter(["math", "code"], show_experts=True)
    printer.console = Console(file=io.StringIO(), soft_wrap=True)
    for share in (0.9, 0.5):
        printer.add(Step(1, "x", {"math": share, "code": 1 - share}))
    printer.end()
    printer.add(Step(1, "y", {"math": 0.25, "code": 0.75}))
    printer.end()
    printer.end()
    assert shown(printer) == "xx\nexperts:  math 70%  code 30%\ny\nexperts:  math 25%  code 75%\n\n"


def test_without_show_experts_there_is_only_the_text():
    printer = on_terminal(StepPrinter(["math", "code"], show_experts=False))
    printer.legend()
    printer.add(Step(1, "one", {"math": 0.8, "code": 0.2}))
    printer.end()
    assert shown(printer) == "one\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_text_is_neither_markup_nor_wrapped_nor_changed(terminal):
    text = "[bold]a[/bold] :smile: 3.14\t'x' \n  trailing  \n" + "long " * 10 + "\n\n"
    printer = on_terminal(StepPrinter(["math"], show_experts=False), width=10)
    if not terminal:
        printer.console = Console(file=io.StringIO(), soft_wrap=True)
    printer.add(Step(1, text, {}))
    assert shown(printer) == text


def test_a_models_text_does_not_steer_the_terminal_but_is_piped_as_it_is():
    printer = on_terminal(StepPrinter([], show_experts=False))
    printer.write("\x1b[2J\r\x7f\x9b")
    assert shown(printer) == "␛[2J␍␡\ufffd"
    printer.console = Console(file=io.StringIO(), soft_wrap=True)
    printer.write("\x1b[2J\r")
    assert shown(printer) == "\x1b[2J\r"


def test_a_legend_breaks_no_name():
    printer = on_terminal(StepPrinter(["math", "code", "licences"], show_experts=True), width=20)
    printer.legend()
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown(printer))
    assert plain == "experts:  math  code\n  licences\n"


def test_32_experts_look_different_and_more_are_said_to_share_colours():
    assert len({style_of(place) for place in range(32)}) == 32
    names = [f"e{number}" for number in range(32)]
    printer = on_terminal(StepPrinter(names, show_experts=True))
    printer.legend()
    assert "colours repeat" not in shown(printer)
    assert shown(printer).count(ORANGE) == shown(printer).count(ORANGE.replace("[", "[4;")) == 1  # e16 is underlined
    printer = on_terminal(StepPrinter([*names, "e32"], show_experts=True))
    printer.legend()
    assert "(colours repeat after 32 experts)" in shown(printer)

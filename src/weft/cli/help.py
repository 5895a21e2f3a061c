"""The texts of `weft --help` and `weft COMMAND --help`, made from the docstrings of the options."""

from __future__ import annotations

import re
import shutil
import textwrap

from weft.cli.commands import COMMANDS, GROUPS
from weft.cli.parser import COMMON
from weft.options.described import Option, description, options_of

_INDENT = 28  # columns before a description
_MIN_WIDTH, _MAX_WIDTH = 40, 100  # columns of the whole text
_OVERVIEW = {
    "--quiet": COMMON["quiet"],
    "--verbose": COMMON["verbose"],
    "--version": "Print versions of weft, torch, transformers, peft.",
    "--help": "Show this help; after a command, its options.",
}


def overview(width: int | None = None) -> str:
    """The help of `weft`: all commands, one line each."""
    width = width or _width()
    lines = ["Usage: weft COMMAND [OPTIONS]", ""]
    lines += _wrapped("Several LoRA adapters as one model that mixes them token by token (X-LoRA).", width)
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        for name in names:
            about = description(COMMANDS[name].options)[0]
            lines += _entry(name, re.split("[;:] ", about)[0].removesuffix("."), width, indent=15)
    lines += ["", "Options:"]
    for name, sentence in _OVERVIEW.items():
        lines += _entry(name, sentence.removesuffix("."), width, indent=15)
    return "\n".join(lines)


def command_help(name: str, width: int | None = None) -> str:
    """The help of a command: its options in groups, and an example."""
    width = width or _width()
    command = COMMANDS[name]
    options = options_of(command.options)
    names = {option.name: option.flag for option in options}
    positional = [option.metavar for option in options if option.positional]
    usage = " ".join(["Usage: weft", name, *positional, "[OPTIONS]"])
    lines = _wrapped(usage, width)
    for paragraph in description(command.options):
        lines += ["", *_wrapped(as_typed(paragraph, names), width)]
    title = None
    for option in options:
        if option.group != title:
            title = option.group
            lines += ["", f"{title}:"] if title else [""]
        lines += _entry(left_side(option), _sentence(option, names), width)
    lines += ["", "All commands:"]
    for common, sentence in COMMON.items():
        lines += _entry(f"--{common}" + " FILE" * (common == "config"), sentence.removesuffix("."), width)
    lines += ["", "Example:", *_example(command.example, width)]
    return "\n".join(lines)


def as_typed(text: str, names: dict[str, str], mark: str = "") -> str:
    """Replace the names of fields in a docstring by options as they are typed.

    Args:
        text: the docstring, with options and commands between backticks.
        names: field -> option as it is typed.
        mark: replaces each backtick.
    """
    return re.sub(r"`([^`]+)`", lambda match: f"{mark}{names.get(match[1], match[1])}{mark}", text)


def left_side(option: Option) -> str:
    """An option as it is typed, with a placeholder for its value."""
    if option.positional:
        return option.metavar
    if option.kind == "switch":
        return f"--[no-]{option.flag[2:]}"
    return f"{option.flag} {option.metavar}"


def _sentence(option: Option, names: dict[str, str]) -> str:
    sentence = as_typed(option.sentence, names).removesuffix(".")
    return sentence + (f" (default: {as_typed(option.default_words, names)})" if option.default_words else "")


def _entry(left: str, right: str, width: int, indent: int = _INDENT) -> list[str]:
    """An option or command with its description beside it, or below if the name is too long."""
    lines = _wrapped(right, width, " " * indent)
    if len(left) + 4 > indent:
        return [f"  {left}", *lines]
    return [f"  {left}".ljust(indent) + lines[0].lstrip(), *lines[1:]]


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        width - 1,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _example(example: str, width: int) -> list[str]:
    """A command line, broken with backslashes as in a shell if it is too long."""
    lines, line = [], "  "
    for word in re.findall(r'(?:"[^"]*"|\S)+', example):
        if len(line) + len(word) + 3 > width:
            lines.append(f"{line.rstrip()} \\")
            line = "    "
        line += f"{word} "
    return [*lines, line.rstrip()]


def _width() -> int:
    return max(_MIN_WIDTH, min(_MAX_WIDTH, shutil.get_terminal_size().columns))

"""A hook of mkdocs: the reference of the command line, from the same docstrings that `weft COMMAND --help` shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from weft.cli.commands import COMMANDS, Command
from weft.cli.help import as_typed, left_side
from weft.options.described import Option, description, options_of

_MARK = "<!-- the commands -->"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put the commands where a page wants them."""
    return markdown.replace(_MARK, "\n".join(section(name, command) for name, command in COMMANDS.items()))


def section(name: str, command: Command) -> str:
    """A command with all of its options, as Markdown."""
    options = options_of(command.options)
    names = {option.name: option.flag for option in options}
    lines = [f"## weft {name}", ""]
    for paragraph in description(command.options):
        lines += [as_typed(paragraph, names, "`"), ""]
    lines += ["```", command.example, "```", ""]
    title = None
    for option in options:
        if option.group != title:
            title = option.group
            lines += ["", f"| {title} | | default |", "| --- | --- | --- |"]
        lines.append(_row(option, names))
    return "\n".join([*lines, "", f"In Python `weft.options.{command.options.__name__}`.", ""])


def _row(option: Option, names: dict[str, str]) -> str:
    words = as_typed(f"{option.sentence} {option.more}".strip(), names, "`")
    cells = [f"`{left_side(option)}`", words, as_typed(option.default_words, names, "`")]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

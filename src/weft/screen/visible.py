"""Names and messages on a screen: what others wrote must not steer the terminal, nor hide what is beside it."""

from __future__ import annotations

import sys
from typing import Any

from weft.screen.loudness import is_quiet

# Control characters are shown as their pictures.
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}
# What turns the direction of the text around it, and halves of characters, which no screen can show.
_HIDDEN = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_PLAIN = PICTURES | dict.fromkeys(_HIDDEN, "\ufffd")
_LONGEST = 200  # characters of a name


def visible(text: str) -> str:
    """Text with all of it to be seen; line feeds and tabs stay."""
    return text.translate(_PLAIN)


def shortened(name: str) -> str:
    """A name that is no longer than a screen can take."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def say(text: str, file: Any = None) -> None:
    """Print a message with names in it."""
    print(visible(text), file=file or sys.stdout, flush=True)


def notice(text: str, file: Any = None) -> None:
    """Print what is good to know while something runs, unless only results are wanted."""
    if not is_quiet():
        say(text, file)

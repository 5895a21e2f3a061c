"""Names and messages on a screen. Untrusted text must not control the terminal or hide other text."""

from __future__ import annotations

import sys
from typing import Any

from weft.screen.loudness import is_quiet
from weft.screen.wrapping import columns_of, wrapped

# Control characters are shown as Unicode's control pictures.
PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
PICTURES |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}
# Characters that change the direction of text, and surrogates, which cannot be shown.
_HIDDEN = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000)]
_PLAIN = PICTURES | dict.fromkeys(_HIDDEN, "\ufffd")
_LONGEST = 200  # characters of a name


def visible(text: str) -> str:
    """Text with its invisible and control characters replaced; line feeds and tabs stay."""
    return text.translate(_PLAIN)


def shortened(name: str) -> str:
    """A name, cut to at most 200 characters."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def say(text: str, file: Any = None) -> None:
    """Print a message, which may contain untrusted names. On a terminal its lines fit, with no word broken."""
    stream = file or sys.stdout
    print(wrapped(visible(text), columns_of(stream)), file=stream, flush=True)


def notice(text: str, file: Any = None) -> None:
    """Print a message that is neither a result nor an error; nothing with `--quiet`."""
    if not is_quiet():
        say(text, file)

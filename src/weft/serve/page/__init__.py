"""The page at `/` of `weft serve`: write or chat, and see which expert leads each token.

One file that asks for nothing but the server's own /v1/weft, /v1/completions and /v1/chat/completions. server.js talks
to it, answers.js shows what it says, settings.js is what a request asks for, app.js what keys and buttons do; they come
after what all pages share (weft/web). Nothing of torch, transformers or peft is needed here.
"""

from __future__ import annotations

from functools import cache

from weft.screen.palette import PALETTE
from weft.screen.web import one_file

_SCRIPTS = ("server.js", "answers.js", "settings.js", "app.js")

# What the page cannot say of itself: no other page may show it in a frame.
HEADERS = {"content-security-policy": "frame-ancestors 'none'"}


@cache
def page() -> str:
    """The page as a string, the same for every mixture: it asks /v1/weft which one is served."""
    return one_file(__package__, _SCRIPTS, {"palette": PALETTE}, "weft")

"""The page at `/` of `weft serve`, for completions and chats that show the leading expert of each token.

It is one file, which only uses the server's own /v1/weft, /v1/completions and /v1/chat/completions. server.js calls the
server, answers.js shows the answers, settings.js has the options of a request, app.js handles keys and buttons. Before
them are the scripts that all pages share (`screen/web`). torch, transformers and peft are not needed here.
"""

from __future__ import annotations

from functools import cache

from weft.screen.palette import PALETTE
from weft.screen.web import one_file

_SCRIPTS = ("server.js", "answers.js", "settings.js", "app.js")

# Sent as a header, as it has no effect in the page itself: no other page may show it in a frame.
HEADERS = {"content-security-policy": "frame-ancestors 'none'"}


@cache
def page() -> str:
    """The page as a string. It is the same for each mixture: it gets the served mixture from /v1/weft."""
    return one_file(__package__, _SCRIPTS, {"palette": PALETTE}, "weft")

"""What weft's pages in a browser share: each is one HTML file that asks for no other file.

words.js says how text of others is shown, experts.js how experts are (colours, bars, what hovers over a token),
common.css how all of it looks. A page's package has a page.html, a style.css and scripts of its own. Nothing of torch
is needed here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

_SCRIPTS = ("words.js", "experts.js")


def one_file(package: str, scripts: Sequence[str], data: Any, title: str = "") -> str:
    """The page of a package, with its data.

    Args:
        package: its name. page.html has the places {{title}}, {{style}}, {{script}}, {{data}}, and {{style_hash}} and
            {{script_hash}} for its Content-Security-Policy, which lets nothing else act.
        scripts: the package's own, in their order.
        data: what JSON can say; the scripts read it.
        title: plain text.

    Example:
        >>> one_file("weft.serve.page", ["app.js"], {"palette": PALETTE})
    """
    shared, own = files(__package__), files(package)
    style = _text(shared, "common.css") + _text(own, "style.css")
    parts = [*(_text(shared, name) for name in _SCRIPTS), *(_text(own, name) for name in scripts)]
    joined = "\n".join(parts)
    script = f'"use strict";\n(() => {{\n{joined}\n}})();\n'
    places = {
        "title": html.escape(title),
        "style": style,
        "style_hash": _csp_hash(style),
        "script": script,
        "script_hash": _csp_hash(script),
        "data": _json(data),
    }
    # All places at once: what a part says is never taken for a place.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], _text(own, "page.html"))


def _text(folder: Any, name: str) -> str:
    text: str = (folder / name).read_text(encoding="utf-8")
    return text


def _csp_hash(text: str) -> str:
    """By which a Content-Security-Policy knows the one script, or style, that may act."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII: no bidi mark stands in the source
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

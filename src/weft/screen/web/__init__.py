"""Shared parts of weft's pages in a browser. Each page is a single HTML file that loads no other file.

words.js shows untrusted text, experts.js shows experts (colours, bars, tooltips of tokens), common.css is the shared
style. A page's package has its own page.html, style.css and scripts. torch is not needed here.
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
    """Return the HTML of a package's page, with its data.

    Args:
        package: name of the package. Its page.html has the placeholders {{title}}, {{style}}, {{script}}, {{data}}, and
            {{style_hash}} and {{script_hash}} for its Content-Security-Policy, which allows no other script or style.
        scripts: file names of the package's own scripts, in their order.
        data: data for the scripts; it must be representable in JSON.
        title: title as plain text.

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
    # All placeholders in one pass, so that none is replaced inside of an inserted part.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], _text(own, "page.html"))


def _text(folder: Any, name: str) -> str:
    text: str = (folder / name).read_text(encoding="utf-8")
    return text


def _csp_hash(text: str) -> str:
    """The hash of a script or style, for the Content-Security-Policy that allows it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: Any) -> str:
    """JSON that cannot end a script element."""
    text = json.dumps(data, separators=(",", ":"))  # ASCII, so that the source has no bidi marks
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

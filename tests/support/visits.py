"""Visits to the page at / of `weft serve`: opened from a scripted server, and what is seen there."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager

from scripted_server import Scripted, event, serving
from weft.screen.palette import PALETTE

EXPERTS = ["code", "law"]
CODE, LAW = {"code": 0.9, "law": 0.1}, {"code": 0.2, "law": 0.8}
END = event("", LAW, finish="stop")


def told(experts=EXPERTS, **fields):
    """What /v1/weft says."""
    return {
        "name": "my-mixture",
        "experts": list(experts),
        "scheme": "one pass, the gate at decoder layer 4",
        "engine": "vLLM 0.32.0",
        "base": "org/base",
        "shares": True,
        "chat": True,
        **fields,
    }


@contextmanager
def visiting(chrome):
    """Opens the page of a server; at the end no script failed and nobody else was asked for anything."""
    problems = []
    with ExitStack() as stack:

        def open_page(answers=(), info=None, key=None, width=1300, height=820, **options):
            scripted = Scripted(info or told(), list(answers), key)
            scripted.server = stack.enter_context(serving(scripted))
            context = chrome.new_context(viewport={"width": width, "height": height}, **options)
            stack.callback(context.close)
            opened = context.new_page()
            opened.set_default_timeout(10_000)
            opened.on("pageerror", lambda error: problems.append(str(error)))
            # A status that is an error, or no answer, is what some tests are about.
            opened.on("console", lambda said: "load resource" in said.text or problems.append(said.text))
            opened.on("request", lambda asked: asked.url.startswith(scripted.url) or problems.append(asked.url))
            opened.goto(scripted.url)
            return opened, scripted

        yield open_page
    assert problems == []


def write(opened, prompt="Once"):
    opened.fill("#prompt", prompt)
    opened.keyboard.press("Control+Enter")


def token(opened, number):
    return opened.locator(f".answers:visible [data-i='{number}']")


def ground(opened, number):
    """The colour behind a token: [r, g, b, opacity], which browsers keep in a byte each."""
    style = token(opened, number).evaluate("span => getComputedStyle(span).backgroundColor")
    found = [float(value) for value in re.findall(r"[\d.]+", style)]
    return found + [1.0] * (4 - len(found))


def bars(opened, within="#bars"):
    """The percentages beside the bars, once all is drawn."""
    opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return opened.locator(f"{within} .bar .number").all_inner_texts()


def rgb(place):
    return [int(PALETTE[place % 8][at : at + 2], 16) for at in (1, 3, 5)]

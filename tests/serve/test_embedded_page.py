"""The page at /, in a real browser, from the embedded engine."""

import re
import time

import pytest

from embedded_server import make_mixture, serving
from visits import bars, token, write
from weft.generation.stream import stream


@pytest.fixture(scope="module", params=[{}, {"gate_layer": 1}], ids=["two passes", "one pass"])
def served(request, tmp_path_factory):
    with serving(make_mixture(tmp_path_factory.mktemp("served"), **request.param)) as served:
        yield served


@pytest.fixture
def opened(chrome, served):
    context = chrome.new_context()
    page = context.new_page()
    page.set_default_timeout(10_000)
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda said: problems.append(said.text))
    page.goto(served.url.removesuffix("v1"))
    yield page
    context.close()
    assert problems == []


def expected(served, text, number):
    return list(stream(served.model, text, tokenizer=served.tokenizer, max_new_tokens=number))


def generated(served):
    return int(
        re.search(r"^weft_generation_tokens_total (\d+)$", served.request("GET", "/metrics")[1].decode(), re.M)[1]
    )


def test_tokens_and_shares_are_those_of_the_model(served, opened, expect):
    opened.fill("#temperature", "0")
    opened.fill("#max-tokens", "8")
    write(opened, "the law")
    expect(opened.locator("#say")).to_contain_text("Done. 8 tokens")
    steps = expected(served, "the law", 8)
    assert opened.locator("#write .tokens").inner_text() == "".join(step.text for step in steps)
    token(opened, 0).click()
    assert bars(opened) == [f"{round(100 * steps[0].shares[name])}%" for name in ("code", "law")]
    opened.get_by_label("Model").select_option("mix:law")
    write(opened, "the law")
    expect(opened.locator("#say")).to_contain_text("Done. 8 tokens")
    assert bars(opened) == ["0%", "100%"]


def test_stop_stops_the_engine(served, opened, expect):
    opened.fill("#max-tokens", "240")
    before = generated(served)
    # Slow enough that somebody can stop it.
    layer = served.engine.model.get_base_model().model.layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    write(opened, "the law")
    expect(token(opened, 1)).to_be_visible()
    opened.keyboard.press("Escape")
    expect(opened.locator("#say")).to_contain_text("Stopped")
    while served.engine.running:
        time.sleep(0.01)
    handle.remove()
    assert 2 <= generated(served) - before < 200

"""The page of traces, in a real browser without a network: it loads, answers to mouse and keys, escapes all text."""

import re
import time

import pytest
import torch

from traced import made
from weft.screen.palette import PALETTE
from weft.traces.page import notebook_cell, page, write_page
from weft.traces.trace import TracedText

PIECES = ["def", " f", "(x", "):", "\n", "\t", "return", " caf", "", "é", " x", "."]
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 2'>",
    "a\u202eb",
    "\x1b&amp;",
]


@pytest.fixture
def show(chrome, tmp_path):
    """Opens the page of some traces; at the end there was no error and no request."""
    contexts, problems = [], []

    def open_page(*traces, **options):
        context = chrome.new_context(offline=True, viewport={"width": 1200, "height": 1400}, **options)
        contexts.append(context)
        write_page(traces, tmp_path / "page.html")
        url = (tmp_path / "page.html").as_uri()
        opened = context.new_page()
        opened.on("console", lambda message: problems.append(message.text))
        opened.on("pageerror", lambda error: problems.append(str(error)))
        opened.on("request", lambda request: request.url == url or problems.append(f"asked for {request.url}"))
        opened.goto(url)
        return opened

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


def token(opened, number):
    return opened.locator(f"[data-i='{number}']")


def ground(opened, number):
    """The colour behind a token: [r, g, b, opacity], which browsers keep in a byte each."""
    found = re.findall(r"[\d.]+", token(opened, number).evaluate("span => getComputedStyle(span).backgroundColor"))
    return [float(value) for value in found] + [1.0] * (4 - len(found))


def settled(opened):
    """Everything asked for is drawn."""
    opened.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def picture(opened, name):
    settled(opened)
    return opened.locator(f"#{name}").evaluate("canvas => canvas.toDataURL()")


def bars(opened, within="#bars"):
    settled(opened)
    return opened.locator(f"{within} .bar .number").all_inner_texts()


def percent(share):
    return f"{100 * share:.{1 if 0 < share < 0.0995 else 0}f}%"


def rgb(place):
    return [int(PALETTE[place % len(PALETTE)][at : at + 2], 16) for at in (1, 3, 5)]


def test_each_token_has_the_colour_of_its_leading_expert_as_opaque_as_its_share(show):
    trace = made(PIECES)
    opened = show(trace)
    assert opened.title() == "made up · weft inspect"
    assert opened.locator("#text [data-i]").count() == len(PIECES)
    shares, leading = trace.shares(), trace.leading().tolist()
    assert set(leading) == {0, 1}
    for number, expert in enumerate(leading):
        *colour, opacity = ground(opened, number)
        assert colour == rgb(expert)
        assert opacity == pytest.approx(float(shares[number, expert]), abs=5e-3)
    assert token(opened, 4).inner_text() == "⏎\n"
    assert token(opened, 5).inner_text() == "⇥\t"
    assert token(opened, 8).inner_text() == "◦"


def test_hovering_shows_all_shares_and_both_probabilities(show):
    trace = made(PIECES)
    opened = show(trace)
    tip = opened.locator("#tip")
    assert not tip.is_visible()
    token(opened, 2).hover()
    assert bars(opened, "#tip") == [percent(share) for share in trace.shares()[2].tolist()]
    told = tip.inner_text()
    assert "“(x”" in told
    for log_probs in (trace.log_probs, trace.base_log_probs):
        assert f"{log_probs[2].exp():.3f}" in told
    token(opened, 0).hover()
    assert "p under the mixture\n–" in re.sub(r"\s*\n\s*", "\n", tip.inner_text())
    opened.mouse.move(5, 5)
    assert not tip.is_visible()


def test_selecting_a_token_a_span_and_all_changes_bars_and_heat_map(show):
    trace = made(PIECES)
    opened = show(trace)
    chosen, everything = opened.locator("#chosen"), picture(opened, "heat")
    assert chosen.inner_text() == f"All {len(PIECES)} tokens"
    mixture, base = trace.perplexities()
    assert f"{mixture:.2f}" in opened.locator("#facts").inner_text()
    assert f"{base:.2f}" in opened.locator("#facts").inner_text()

    token(opened, 2).click()
    assert bars(opened) == [percent(share) for share in trace.shares()[2].tolist()]
    assert chosen.inner_text() == "Token 2"
    one = picture(opened, "heat")
    entropy = picture(opened, "entropy")

    token(opened, 6).click(modifiers=["Shift"])
    assert bars(opened) == [percent(share) for share in trace.shares()[2:7].mean(0).tolist()]
    assert chosen.inner_text() == "Tokens 2–6 (5)"
    assert opened.locator("#text .chosen").count() == 5
    span = picture(opened, "heat")
    assert len({everything, one, span}) == 3
    assert entropy != picture(opened, "entropy")

    opened.keyboard.press("Escape")
    assert picture(opened, "heat") == everything
    assert opened.locator("#text .chosen").count() == 0


def test_dragging_selects_a_span_in_the_text_and_in_the_chart(show):
    opened = show(made(PIECES))
    token(opened, 1).hover()
    opened.mouse.down()
    token(opened, 3).hover()
    opened.mouse.up()
    settled(opened)
    assert opened.locator("#chosen").inner_text() == "Tokens 1–3 (3)"
    box = opened.locator("#positions").bounding_box()
    places = [box["x"] + 92 + (box["width"] - 100) * part for part in (0.01, 0.99)]
    opened.mouse.move(places[0], box["y"] + 50)
    opened.mouse.down()
    opened.mouse.move(places[1], box["y"] + 50)
    opened.mouse.up()
    settled(opened)
    assert opened.locator("#chosen").inner_text() == "Tokens 0–11 (12)"


def test_the_text_takes_the_colours_of_one_layer_or_one_expert(show):
    trace = made(PIECES)
    opened = show(trace)
    box = opened.locator("#heat").bounding_box()
    layer = 3
    opened.mouse.click(box["x"] + 92 + (box["width"] - 100) * (layer + 0.5) / 6, box["y"] + 10)
    settled(opened)
    assert "model.layers.1.v_proj" in opened.locator("#of").inner_text()
    for number in range(len(PIECES)):
        row = trace.scalings[number, layer].float()
        assert ground(opened, number) == pytest.approx([*rgb(int(row.argmax())), float(row.max())], abs=5e-3)
    opened.keyboard.press("Escape")
    opened.locator("#legend button").nth(1).click()
    for number, row in enumerate(trace.shares().tolist()):
        assert ground(opened, number) == pytest.approx([*rgb(1), row[1]], abs=5e-3)


def test_against_the_average_the_colours_show_who_acts_more_than_usual(show):
    pieces = ["a", "b", "c", "d"]
    scalings = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.9, 0.1], [0.6, 0.4]])[:, None]
    trace = made(pieces, num_layers=1, scalings=scalings)
    opened = show(trace)
    assert [ground(opened, number)[:3] for number in range(4)] == [rgb(0)] * 4
    before = bars(opened), picture(opened, "positions")
    opened.keyboard.press("r")
    relative = trace.shares() / trace.shares().mean(0)
    relative /= relative.sum(-1, keepdim=True)
    for number, expert in enumerate((0, 0, 0, 1)):
        assert ground(opened, number) == pytest.approx([*rgb(expert), float(relative[number, expert])], abs=5e-3)
    assert bars(opened) == before[0]
    assert picture(opened, "positions") != before[1]
    opened.get_by_role("button", name="against the average").click()
    assert picture(opened, "positions") == before[1]


def test_keys_walk_extend_and_end(show):
    opened = show(made(PIECES))
    chosen = opened.locator("#chosen")
    for keys, title in (
        (["ArrowRight"], "Token 0"),
        (["ArrowRight", "ArrowRight"], "Token 2"),
        (["Shift+ArrowRight", "Shift+ArrowRight"], "Tokens 2–4 (3)"),
        (["Shift+ArrowLeft"] * 3, "Tokens 1–2 (2)"),
        (["End"], "Token 11"),
        (["ArrowRight"], "Token 11"),
        (["Home"], "Token 0"),
        (["Escape"], "All 12 tokens"),
        (["ArrowLeft"], "Token 11"),
    ):
        for key in keys:
            opened.keyboard.press(key)
        settled(opened)
        assert chosen.inner_text() == title, keys
    opened.keyboard.press("?")
    assert opened.locator("#help").is_visible()


def test_traces_are_switched_by_button_and_key_and_keep_the_selection(show):
    one, other = made(PIECES), made(PIECES, seed=5, title="the other", experts=("law", "chemistry"))
    opened = show(one, other)
    token(opened, 2).click()
    before = bars(opened)
    opened.get_by_role("button", name="the other").click()
    assert bars(opened) == [percent(share) for share in other.shares()[2].tolist()] != before
    assert opened.locator("#title").inner_text() == "the other"
    assert opened.locator("#chosen").inner_text() == "Token 2"
    # law is the second expert of all, chemistry the third, whatever their place in a trace.
    leading = int(other.leading()[2])
    assert ground(opened, 2)[:3] == rgb(leading + 1)
    opened.keyboard.press("1")
    assert bars(opened) == before
    opened.keyboard.press("3")
    assert opened.locator("#title").inner_text() == "made up"


def test_data_sets_have_a_row_each_that_selects_their_tokens(show):
    texts = (TracedText("code", 3), TracedText("code", 2), TracedText("law", 7))
    trace = made(PIECES, texts=texts)
    opened = show(trace)
    rows = opened.locator("#domains tbody tr")
    assert rows.count() == 2
    for name, row in zip(("code", "law"), rows.all(), strict=True):
        cells = row.locator("th, td").all_inner_texts()
        mixture, base = trace.only(name).perplexities()
        shares = [percent(share) for share in trace.by_name()[name].tolist()]
        assert [cells[0], *cells[2:]] == [name, *shares, f"{base:.2f}", f"{mixture:.2f}"]
    rows.nth(1).click()
    settled(opened)
    assert opened.locator("#chosen").inner_text() == "Tokens 5–11 (7)"
    assert show(made(PIECES)).locator("#domains").is_hidden()


def test_dark_and_light_follow_the_system_until_chosen(show):
    def background(opened):
        return opened.evaluate("() => getComputedStyle(document.body).backgroundColor")

    opened = show(made(PIECES))
    light, heat = background(opened), picture(opened, "heat")
    opened.keyboard.press("t")
    dark = background(opened)
    assert dark != light
    assert picture(opened, "heat") != heat
    opened.locator("#theme").click()
    assert background(opened) == light
    follows = show(made(PIECES), color_scheme="dark")
    assert background(follows) == dark
    follows.keyboard.press("t")
    assert background(follows) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour(show, scheme):
    trace = made(["x"] * 64, experts=[f"e{number}" for number in range(8)])
    opened = show(trace, color_scheme=scheme)
    contrasts = opened.evaluate("""() => {
        const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const panel = numbers(getComputedStyle(document.getElementById("text")).backgroundColor);
        return [...document.querySelectorAll("[data-i]")].map((span) => {
            const style = getComputedStyle(span), [r, g, b, a = 1] = numbers(style.backgroundColor);
            const ink = light(numbers(style.color));
            const under = light([r, g, b].map((v, i) => panel[i] + (v - panel[i]) * a));
            return (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05);
        });
    }""")
    assert min(contrasts) > 4


def test_text_and_names_from_users_are_only_ever_text(show):
    trace = made(
        HOSTILE,
        experts=(HOSTILE[0], HOSTILE[1]),
        title=HOSTILE[0],
        texts=(TracedText(HOSTILE[1], 2), TracedText("\u202e", 2)),
    )
    assert "\u202e" not in page([trace])
    opened = show(trace, trace)
    token(opened, 1).hover()
    token(opened, 2).click()
    settled(opened)
    assert opened.evaluate("() => window.hacked") is None
    assert opened.locator("img").count() == 0
    assert opened.locator("script").count() == 2
    assert [span.inner_text() for span in opened.locator("#text [data-i]").all()] == [
        HOSTILE[0],
        HOSTILE[1],
        "a⟦RLO⟧b",
        "␛&amp;",
    ]
    assert HOSTILE[0] in opened.locator("#legend").inner_text()
    assert "⟦RLO⟧" in opened.locator("#domains").inner_text()


def test_the_title_of_the_window_holds_no_marks_and_long_names_are_cut(show):
    trace = made(PIECES, experts=("e" * 200_000, "code"), title="a\u202eb" + "t" * 200_000)
    assert "\u202e" not in page([trace])
    assert len(page([trace])) < 200_000
    opened = show(trace)
    assert opened.title().startswith("a\ufffdb")
    assert opened.locator("#legend").inner_text().startswith("e" * 199 + "\u2026")


def test_scripts_and_styles_other_than_its_own_do_nothing(chrome, tmp_path):
    text = page([made(PIECES)])
    assert "unsafe-inline" not in text
    added = "<script>window.hacked = 1</script><b id=styled style='color: red' onclick='window.hacked = 2'>x</b></body>"
    (tmp_path / "page.html").write_text(text.replace("</body>", added), encoding="utf-8")
    opened = chrome.new_page()
    opened.goto((tmp_path / "page.html").as_uri())
    opened.evaluate("document.getElementById('styled').click()")
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("getComputedStyle(document.getElementById('styled')).color") != "rgb(255, 0, 0)"
    opened.close()


def test_nothing_can_be_asked_for_even_by_a_script_in_the_page(chrome, tmp_path):
    write_page([made(PIECES)], tmp_path / "page.html")
    opened = chrome.new_page()
    opened.goto((tmp_path / "page.html").as_uri())
    answer = opened.evaluate("() => fetch('http://127.0.0.1:9/').then(() => 'sent', (error) => String(error))")
    assert "TypeError" in answer
    opened.close()


def test_more_experts_than_colours_are_told_apart_by_a_line(show):
    colours = len(PALETTE)
    trace = made(["x"] * 60, experts=[f"e{number}" for number in range(colours + 2)])
    opened = show(trace)
    leading = trace.leading()
    assert (leading >= colours).any()
    assert opened.locator("#text .second").count() == int((leading >= colours).sum())
    assert opened.locator("#legend .swatch.second").count() == 2


def test_one_value_for_all_layers_and_no_probabilities_are_shown(show):
    nothing = torch.full((len(PIECES),), torch.nan)
    trace = made(PIECES, num_layers=1, layer_names=("all layers",), log_probs=nothing, base_log_probs=nothing)
    opened = show(trace)
    assert opened.locator("#gain-part").is_hidden()
    token(opened, 3).hover()
    assert "p under" not in opened.locator("#tip").inner_text()


def test_generated_text_is_marked(show):
    opened = show(made(PIECES, texts=(TracedText("", 12, prompt_length=4),)))
    assert opened.locator(".begin").count() == 1
    assert opened.locator(".begin + span").get_attribute("data-i") == "4"


def test_a_notebook_shows_the_page_in_a_frame(chrome):
    trace = made(PIECES)
    assert trace._repr_html_() == notebook_cell(trace)
    opened = chrome.new_page()
    opened.set_content(f"<p>before</p>{trace._repr_html_()}")
    frame = opened.frame_locator("iframe")
    assert frame.locator("#text [data-i]").count() == len(PIECES)
    assert frame.locator("#chosen").inner_text() == "All 12 tokens"
    opened.close()


def test_2000_tokens_210_layers_and_16_experts_are_fast(show):
    trace = made([" word"] * 2000, experts=[f"expert{number}" for number in range(16)], num_layers=210)
    start = time.perf_counter()
    opened = show(trace)
    settled(opened)
    loaded = time.perf_counter() - start
    assert opened.locator("#text [data-i]").count() == 2000
    drawn = opened.evaluate("""async () => {
        const press = (key, shiftKey) => window.dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey }));
        const start = performance.now();
        press("Home"); press("End", true);
        await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
        return performance.now() - start;
    }""")
    print(f"written and loaded in {loaded:.1f} s, redrawn in {drawn:.0f} ms")
    assert loaded < 20
    assert drawn < 20_000  # milliseconds: it does not hang; how fast it is depends on what else runs


def test_a_page_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none/page.html cannot be written: .*; give another file"):
        write_page([made(PIECES)], tmp_path / "none" / "page.html")
    with pytest.raises(ValueError, match="traces is empty: the page needs at least one"):
        page([])

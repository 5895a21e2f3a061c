"""The page at / of `weft serve`: what is asked for, with mouse and keys, at all sizes, in both themes, of any names."""

import re
import subprocess
import sys
import threading

import pytest

from scripted_server import DONE, Scripted, event, serving
from visits import CODE, END, LAW, bars, ground, token, told, write
from weft.screen.palette import PALETTE
from weft.serve.page import page

COLOURS = len(PALETTE)

HOSTILE = ["<img src=x onerror='window.hacked = 1'>", "a\u202eb\u115f", "</script><b>", "\x1b&amp;\u0007"]


def ended(opened, expect):
    expect(opened.locator("#say")).to_contain_text("Done")


def asked(opened, scripted, expect):
    """The body of a request that is sent now."""
    scripted.answers.append([event("x", CODE), END, DONE])
    count = len(scripted.asked)
    opened.locator("#say").evaluate("say => { say.textContent = ''; }")
    write(opened)
    ended(opened, expect)
    assert len(scripted.asked) == count + 1
    return scripted.asked[-1][1]


def slide(opened, name, value):
    opened.get_by_label(f"Weight of {name}").fill(str(value))


# ---------------------------------------------------------------- what is asked for


def test_the_first_request_leaves_all_to_the_gate(visit, expect):
    opened, scripted = visit()
    assert asked(opened, scripted, expect) == {
        "model": "my-mixture",
        "prompt": "Once",
        "max_tokens": 256,
        "temperature": 0.7,
        "stream": True,
        "weft": {"shares": True},
    }


def test_sliders_are_weights_until_the_gate_decides_again(visit, expect):
    opened, scripted = visit()
    assert not opened.get_by_label("Weight of code").is_visible()
    opened.get_by_text("My weights").click()
    assert asked(opened, scripted, expect)["weft"] == {"shares": True, "weights": {"code": 0.5, "law": 0.5}}
    slide(opened, "code", 0.85)
    slide(opened, "law", 0)
    assert opened.locator(".weight output").all_inner_texts() == ["0.85", "0"]
    assert asked(opened, scripted, expect)["weft"] == {"shares": True, "weights": {"code": 0.85, "law": 0}}
    opened.get_by_role("button", name="Reset to equal weights").click()
    assert asked(opened, scripted, expect)["weft"] == {"shares": True, "weights": {"code": 0.5, "law": 0.5}}
    opened.get_by_text("The gate decides").click()
    assert asked(opened, scripted, expect)["weft"] == {"shares": True}


def test_how_many_experts_is_the_gates_matter(visit, expect):
    opened, scripted = visit()
    opened.get_by_label("Experts per token").select_option("1 of 2")
    assert asked(opened, scripted, expect)["weft"] == {"shares": True, "top_k": 1}
    # A server refuses both: weights leave the gate no choice.
    opened.get_by_text("My weights").click()
    assert opened.get_by_label("Experts per token").is_disabled()
    assert "top_k" not in asked(opened, scripted, expect)["weft"]


@pytest.mark.parametrize(
    ("option", "model"), [("code alone", "my-mixture:code"), ("The base model", "my-mixture:base")]
)
def test_one_expert_or_the_base_alone_leaves_nothing_to_decide(visit, expect, option, model):
    opened, scripted = visit()
    opened.get_by_text("My weights").click()
    opened.get_by_label("Model").select_option(option)
    assert not opened.get_by_label("Weight of code").is_visible()
    assert opened.get_by_role("radio", name="The gate decides").is_disabled()
    body = asked(opened, scripted, expect)
    assert (body["model"], body["weft"]) == (model, {"shares": True})
    opened.get_by_label("Model").select_option("The mixture")
    assert asked(opened, scripted, expect)["weft"]["weights"] == {"code": 0.5, "law": 0.5}


def test_numbers_are_sent_as_they_stand_and_what_is_none_is_not_sent(visit, expect):
    opened, scripted = visit()
    for label, value in (("Temperature", "0"), ("Tokens at most", "7"), ("Seed", "42")):
        opened.get_by_label(label).fill(value)
    body = asked(opened, scripted, expect)
    assert (body["temperature"], body["max_tokens"], body["seed"]) == (0, 7, 42)
    for label, value in (("Temperature", "-1"), ("Tokens at most", "0"), ("Tokens at most", ""), ("Seed", "1.5")):
        field = opened.get_by_label(label)
        before = field.input_value()
        field.fill(value)
        write(opened)
        assert field.evaluate("field => document.activeElement === field && !field.validity.valid")
        field.fill(before)
    opened.fill("#prompt", "")
    opened.get_by_role("button", name="Continue").click()
    assert opened.locator("#prompt").evaluate("field => document.activeElement === field")
    assert len(scripted.asked) == 1


def test_the_base_models_tokens_have_no_colour(visit, expect):
    nobody = {"code": 0.0, "law": 0.0}
    opened, _ = visit([[event("plain", nobody), event("", nobody, finish="stop"), DONE]])
    write(opened)
    ended(opened, expect)
    assert ground(opened, 0)[3] == 0
    assert bars(opened) == ["0%", "0%"]
    assert opened.locator(".bar.leading").count() == 0


# ---------------------------------------------------------------- any names, any number


@pytest.mark.parametrize("count", [1, 8, 32])
def test_one_to_thirty_two_experts(visit, expect, count):
    names = [f"expert-{number}" for number in range(count)]
    shares = [{name: float(name == lead) for name in names} for lead in names]
    parts = [event(f" {number}", row) for number, row in enumerate(shares)]
    opened, scripted = visit([[*parts, event("", finish="stop"), DONE]], told(names))
    write(opened)
    ended(opened, expect)
    assert len(bars(opened)) == count
    assert opened.locator(".tokens .second").count() == max(0, count - COLOURS)
    assert opened.locator("#bars .swatch.second").count() == max(0, count - COLOURS)
    assert len({tuple(ground(opened, number)) for number in range(count)}) == min(count, COLOURS)
    token(opened, count - 1).hover()
    assert len(bars(opened, "#tip")) == min(count, 6)
    assert ("26 more experts" in opened.locator("#tip").inner_text()) == (count == 32)
    opened.get_by_text("My weights").click()
    weights = asked(opened, scripted, expect)["weft"]["weights"]
    assert weights == {name: pytest.approx(1 / count) for name in names}


def test_names_and_text_from_others_are_only_ever_text(visit, expect):
    shares = dict.fromkeys(HOSTILE, 0.25)
    info = told(HOSTILE, name=HOSTILE[0], scheme=HOSTILE[0], engine=HOSTILE[1], base=HOSTILE[2])
    pieces = [*HOSTILE, "\tx\n", "👩\u200d💻"]
    opened, scripted = visit([[*(event(piece, shares) for piece in pieces), END, DONE]], info)
    write(opened, HOSTILE[0])
    ended(opened, expect)
    shown = [span.text_content() for span in opened.locator(".tokens span").all()]
    assert shown == [HOSTILE[0], "a⟦RLO⟧b⟦U+115F⟧", HOSTILE[2], "␛&amp;␇", "\tx\n", "👩\u200d💻"]
    token(opened, 1).hover()
    assert "“a⟦RLO⟧b" in opened.locator("#tip").inner_text()
    token(opened, 0).click()
    opened.get_by_text("My weights").click()
    assert asked(opened, scripted, expect)["weft"]["weights"] == dict.fromkeys(HOSTILE, 0.25)
    opened.get_by_role("button", name="Chat").click()
    scripted.answers.append([event(HOSTILE[0], shares, chat=True), event("", finish="stop", chat=True), DONE])
    opened.fill("#message", HOSTILE[0] + HOSTILE[1])
    opened.keyboard.press("Control+Enter")
    expect(opened.locator(".said")).to_have_text(HOSTILE[0] + "a⟦RLO⟧b⟦U+115F⟧")
    expect(token(opened, 0)).to_have_text(HOSTILE[0])
    assert scripted.asked[-1][1]["messages"][0]["content"] == HOSTILE[0] + HOSTILE[1]
    assert opened.evaluate("window.hacked") is None
    assert opened.locator("img, b:has-text('alone')").count() == 0
    assert "\u202e" not in opened.locator("body").text_content() + opened.title()
    names = opened.locator("#bars .name").all_inner_texts()
    assert names == [HOSTILE[0], "a⟦RLO⟧b⟦U+115F⟧", HOSTILE[2], "␛&amp;␇"]


# ---------------------------------------------------------------- keys, sizes, themes


def test_everything_is_reached_and_done_with_keys_alone(visit, expect):
    opened, scripted = visit([[event("def", CODE), event(" the", LAW), END, DONE]])
    keyboard = opened.keyboard
    opened.locator("#prompt").wait_for()
    keyboard.type("Once")  # the prompt has the focus from the start
    focused = "() => { const at = document.activeElement; return at.id || at.name || at.dataset.mode || at.className; }"
    seen = []
    for _ in range(30):
        keyboard.press("Tab")
        seen.append(opened.evaluate(focused))
        outline = (
            "() => getComputedStyle(document.activeElement.closest('label') ?? document.activeElement).outlineStyle"
        )
        assert seen[-1] == "" or opened.evaluate(outline) != "none", seen[-1]
        if seen[-1] == "prompt":
            break
    inner = ["go", "stop", "add", "answers", "who", "model", "top-k", "temperature", "max-tokens", "seed"]
    assert [name for name in seen if name in inner] == inner
    assert {"write", "chat", "theme"} <= set(seen)
    keyboard.press("Tab")
    keyboard.press("Space")  # Continue
    ended(opened, expect)
    for _ in range(3):
        keyboard.press("Tab")
    for key, title in (
        ("ArrowRight", "def"),
        ("ArrowRight", " the"),
        ("Home", "def"),
        ("ArrowLeft", "def"),
        ("End", " the"),
    ):
        keyboard.press(key)
        assert opened.locator("#of").inner_text() == f"Token “{title}”"
    assert bars(opened) == ["20%", "80%"]
    assert opened.locator("#say").inner_text() == "“ the”, law 80%, code 20%"
    keyboard.press("Tab")
    keyboard.press("ArrowRight")  # My weights
    keyboard.press("Tab")
    for _ in range(10):
        keyboard.press("ArrowRight")
    scripted.answers.append([event("x", CODE), END, DONE])
    keyboard.press("Control+Enter")
    ended(opened, expect)
    assert scripted.asked[-1][1]["weft"]["weights"] == {"code": 0.6, "law": 0.5}


def test_every_control_has_a_name(visit):
    opened, _ = visit()
    opened.get_by_text("My weights").click()
    for mode in ("Write", "Chat"):
        opened.get_by_role("button", name=mode, exact=True).click()
        for control in opened.locator(":is(button, input, select, textarea):visible").all():
            named = "at => at.getAttribute('aria-label') || at.labels?.[0]?.textContent || at.textContent"
            assert control.evaluate(named).strip()


def test_a_screen_reader_is_told_of_begin_and_end_not_of_each_token(visit, expect):
    parts = [part for number in range(50) for part in (event(f" {number}", CODE), 0.005)]
    opened, _ = visit([[*parts, END, DONE]])
    opened.evaluate("""() => {
        window.told = [];
        const note = () => window.told.push(document.getElementById("say").textContent);
        new MutationObserver(note).observe(document.getElementById("say"), { childList: true });
    }""")
    write(opened)
    ended(opened, expect)
    told_of = opened.evaluate("window.told")
    assert [re.sub(r" · .*", "", said) for said in told_of] == ["The answer is coming.", "Done. 51 tokens"]
    assert opened.locator(".tokens").locator("xpath=ancestor-or-self::*[@aria-live or @role='status']").count() == 0


@pytest.mark.parametrize(("width", "height"), [(360, 740), (820, 1000), (1300, 820), (900, 420)])
@pytest.mark.parametrize("mode", ["Write", "Chat"])
def test_nothing_moves_while_an_answer_comes_and_nothing_is_wider_than_the_screen(visit, expect, width, height, mode):
    chat = mode == "Chat"
    halfway = threading.Event()
    half = [event(f" word{number}", CODE, chat=chat) for number in range(400)]
    parts = [*half, halfway, *half, event("", LAW, finish="stop", chat=chat), DONE]
    opened, _ = visit(
        [parts], told(["code", "law", "x" * 60], base="/a/long/path/" + "y" * 90), width=width, height=height
    )
    opened.get_by_role("button", name=mode, exact=True).click()
    boxes = """() => [...document.querySelectorAll("header, main, .work > *, aside > *, form > *, .answers, button")]
        .filter((each) => each.checkVisibility())
        .map((each) => each.getBoundingClientRect().toJSON())"""
    before = opened.evaluate(boxes)
    opened.locator("textarea:visible").fill("Once")
    # By script, which moves neither focus nor page.
    opened.evaluate("() => document.querySelector('section:not([hidden]) .go').click()")
    expect(token(opened, 399)).to_be_attached()
    assert opened.evaluate(boxes) == before
    panel = opened.locator(".answers:visible")
    to_end = "panel => panel.scrollHeight - panel.clientHeight - panel.scrollTop"
    assert bars(opened)[0] == "90%"
    assert panel.evaluate(to_end) < 2  # the newest text is in sight
    panel.evaluate("panel => { panel.scrollTop = 0; }")
    bars(opened)
    halfway.set()
    ended(opened, expect)
    assert panel.evaluate("panel => panel.scrollTop") == 0  # who reads above is left there
    assert opened.evaluate(boxes) == before
    assert opened.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light_follow_the_system_until_chosen(visit, expect):
    def background(opened):
        return opened.evaluate("getComputedStyle(document.body).backgroundColor")

    opened, _ = visit()
    light = background(opened)
    opened.locator("#theme").click()
    dark = background(opened)
    assert dark != light
    opened.locator("#theme").click()
    assert background(opened) == light
    follows, _ = visit(color_scheme="dark")
    assert background(follows) == dark
    follows.emulate_media(color_scheme="light")
    assert background(follows) == light


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_on_every_colour_in_both_themes(visit, expect, scheme):
    names = [f"e{number}" for number in range(8)]
    shares = [{name: share if name == lead else 0.0 for name in names} for share in (0.3, 0.7, 1.0) for lead in names]
    opened, _ = visit([[*(event("x", row) for row in shares), END, DONE]], told(names), color_scheme=scheme)
    write(opened)
    ended(opened, expect)
    worst = """() => {
        const part = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = ([r, g, b]) => 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
        const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
        const panel = numbers(getComputedStyle(document.querySelector("#write .answers")).backgroundColor);
        return Math.min(...[...document.querySelectorAll("[data-i]")].map((span) => {
            const style = getComputedStyle(span), [r, g, b, a = 1] = numbers(style.backgroundColor);
            const ink = light(numbers(style.color));
            const under = light([r, g, b].map((v, i) => panel[i] + (v - panel[i]) * a));
            return (Math.max(ink, under) + 0.05) / (Math.min(ink, under) + 0.05);
        }));
    }"""
    assert opened.evaluate(worst) > 4.5
    opened.locator("#theme").click()
    assert opened.evaluate(worst) > 4.5


# ---------------------------------------------------------------- the file


def test_it_names_no_other_host_and_asks_none_even_by_a_script_in_it(visit):
    text = page()
    assert "://" not in text
    assert "unsafe" not in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    opened, scripted = visit()
    with serving(Scripted(told())) as other:
        # A page of its own: that it is forbidden is reported, and `visit` lets nothing be.
        scripts = opened.context.new_page()
        scripts.goto(scripted.url)
        ask = "url => fetch(url, { mode: 'no-cors' }).then(() => 'sent', (error) => String(error))"
        assert scripts.evaluate(ask, f"{scripted.url}v1/weft") == "sent"
        assert "TypeError" in scripts.evaluate(ask, f"{other.scripted.url}v1/weft")
    added = "() => { const script = document.createElement('script'); script.textContent = 'window.hacked = 1'; "
    assert scripts.evaluate(added + "document.body.append(script); return window.hacked ?? null; }") is None


def test_making_it_needs_nothing_heavy():
    code = (
        "import sys, weft.serve.page as p; assert p.page() == p.page(); "
        "print(sorted({'torch', 'peft', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"

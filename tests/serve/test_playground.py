"""The page at / of `weft serve`, in a real browser, against a server over real sockets whose answers are scripted."""

import re
import threading

import pytest

from scripted_server import CUT, DONE, Reply, event, refusal
from visits import CODE, END, LAW, bars, ground, rgb, token, told, write

HOSTILE = "<img src=x onerror='window.hacked = 1'>"


# ---------------------------------------------------------------- what comes


def test_tokens_come_in_the_colour_of_their_leading_expert_as_strong_as_its_share(visit, expect):
    more = threading.Event()
    opened, scripted = visit([[event("def", CODE), event(" the", LAW), more, event(" end", CODE), END, DONE]])
    expect(opened).to_have_title("my-mixture · weft")
    expect(opened.locator("#runs")).to_have_text("one pass, the gate at decoder layer 4vLLM 0.32.0org/base")
    assert opened.locator("#of").inner_text() == "Experts"
    assert bars(opened) == ["", ""]
    write(opened)
    expect(token(opened, 1)).to_have_text(" the")
    assert [ground(opened, number)[:3] for number in (0, 1)] == [rgb(0), rgb(1)]
    strengths = [ground(opened, number)[3] for number in (0, 1)]
    assert strengths == pytest.approx([0.4 * 0.9, 0.4 * 0.8], abs=5e-3)
    assert bars(opened) == ["55%", "45%"]
    expect(opened.locator("#write .meter")).to_contain_text("2 tokens")
    assert opened.locator("#write .stop").get_attribute("aria-disabled") == "false"
    more.set()
    expect(opened.locator("#say")).to_contain_text("Done. 4 tokens · ")
    expect(opened.locator("#write .meter")).to_have_text(re.compile(r"4 tokens · [\d.]+ tokens/s"))
    assert bars(opened) == ["55%", "45%"]
    assert opened.locator("#write .tokens").inner_text() == "def the end"
    assert opened.locator("#write .stop").get_attribute("aria-disabled") == "true"
    assert scripted.asked[0][0] == "/v1/completions"


def test_hovering_and_choosing_show_all_shares(visit, expect):
    opened, _ = visit([[event("def", CODE), event(" the", LAW), END, DONE]])
    write(opened)
    expect(opened.locator("#say")).to_contain_text("Done")
    token(opened, 0).hover()
    assert bars(opened, "#tip") == ["90%", "10%"]
    assert opened.locator("#tip .quoted").inner_text() == "“def”"
    assert opened.locator("#of").inner_text() == "This answer"
    token(opened, 1).click()
    assert bars(opened) == ["20%", "80%"]
    assert opened.locator("#of").inner_text() == "Token “ the”"
    opened.keyboard.press("Escape")
    assert opened.locator("#of").inner_text() == "This answer"
    assert opened.locator("#tip").is_hidden()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_bytes_may_be_cut_anywhere(visit, expect, end):
    answer = event("né 🧵", CODE, end=end) + b": a comment" + 2 * end.encode() + event("日本", LAW, end=end)
    answer += end.join(['data: {"choices": [{"text": "!",', 'data: "finish_reason": "stop"}]}', "", ""]).encode() + DONE
    parts = [part for place in range(len(answer)) for part in (answer[place : place + 1], 0.001)]
    opened, _ = visit([parts])
    write(opened)
    expect(opened.locator("#say")).to_contain_text("Done. 2 tokens")
    assert [span.inner_text() for span in opened.locator(".tokens span").all()] == ["né 🧵", "日本", "!"]


def test_one_event_may_have_several_lines_and_one_read_several_events(visit, expect):
    lines = b'data: {"choices": [{"text": "a",\ndata:"finish_reason": null}]}\nid: 7\n\n'
    opened, _ = visit([[lines + event("b", CODE) + event("c", LAW, finish="stop") + DONE]])
    write(opened)
    expect(opened.locator("#say")).to_contain_text("Done. 2 tokens")
    assert opened.locator(".tokens").inner_text() == "abc"
    assert token(opened, 0).get_attribute("style") is None


def test_tokens_without_text_and_several_tokens_of_one_text_are_one_piece(visit, expect):
    opened, _ = visit([[event("", CODE), event("é", LAW), event(" two words", CODE, LAW), END, DONE]])
    write(opened)
    expect(opened.locator("#say")).to_contain_text("Done. 5 tokens")
    assert opened.locator(".tokens span").count() == 2
    for number in (0, 1):
        token(opened, number).hover()
        assert bars(opened, "#tip") == ["55%", "45%"]
        assert "mean of 2 tokens" in opened.locator("#tip").inner_text()
    # The last token ends the answer and has no text.
    assert bars(opened) == ["48%", "52%"]


def test_an_engine_without_shares_is_not_asked_for_them(visit, expect):
    opened, scripted = visit([[event("plain"), event("", finish="stop"), DONE]], told(shares=False))
    write(opened)
    expect(opened.locator("#say")).to_contain_text("Done")
    assert "weft" not in scripted.asked[0][1]
    assert opened.locator(".tokens").inner_text() == "plain"
    token(opened, 0).click()
    assert opened.locator("#tip").inner_text() == "“plain”"
    assert opened.locator("#write .meter").inner_text() == ""


@pytest.mark.parametrize(
    ("parts", "note"),
    [
        ([event("a", CODE, finish="length"), DONE], "Cut here: it has as many tokens as the settings allow."),
        ([END, DONE], "The answer is empty: the model ended it at once."),
    ],
)
def test_an_answer_that_is_cut_or_empty_says_so(visit, expect, parts, note):
    opened, _ = visit([parts])
    write(opened)
    expect(opened.locator(".stopped")).to_have_text(note)


def test_the_continuation_can_become_part_of_the_prompt(visit, expect):
    opened, scripted = visit([[event(" upon", CODE), END, DONE], [event(" a", LAW), END, DONE]])
    write(opened, "Once")
    expect(opened.locator("#add")).to_have_attribute("aria-disabled", "false")
    opened.click("#add")
    assert opened.locator("#prompt").input_value() == "Once upon"
    assert opened.locator(".tokens").count() == 0
    opened.keyboard.press("Control+Enter")
    expect(opened.locator("#say")).to_contain_text("Done")
    assert [body["prompt"] for _, body in scripted.asked] == ["Once", "Once upon"]


# ---------------------------------------------------------------- chat


def test_a_chat_sends_all_its_turns_and_begins_anew(visit, expect):
    def turn(text):
        return [event("", chat=True), event(text, CODE, chat=True), event("", LAW, finish="stop", chat=True), DONE]

    opened, scripted = visit([turn("One"), turn("Two"), turn("Three")])
    opened.get_by_role("button", name="Chat").click()
    for number, message in enumerate(("first", "second")):
        opened.fill("#message", message)
        opened.keyboard.press("Control+Enter")
        expect(token(opened, number)).to_have_text(("One", "Two")[number])
        expect(opened.locator("#new")).to_have_attribute("aria-disabled", "false")
        assert opened.locator("#message").input_value() == ""
    path, body = scripted.asked[1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "One"},
        {"role": "user", "content": "second"},
    ]
    assert ground(opened, 1)[:3] == rgb(0)
    opened.click("#new")
    opened.keyboard.type("third")
    opened.keyboard.press("Meta+Enter")
    expect(token(opened, 0)).to_have_text("Three")
    assert scripted.asked[2][1]["messages"] == [{"role": "user", "content": "third"}]
    opened.get_by_role("button", name="Write").click()
    assert opened.locator("#prompt").is_visible()
    assert opened.locator("#message").is_hidden()


def test_what_was_typed_meanwhile_stays_after_a_message_that_comes_back(visit, expect):
    opened, _ = visit([[threading.Event()]])
    opened.get_by_role("button", name="Chat").click()
    opened.fill("#message", "one")
    opened.keyboard.press("Control+Enter")
    expect(opened.locator(".said")).to_have_text("one")
    opened.fill("#message", "two")
    opened.keyboard.press("Escape")
    expect(opened.locator("#message")).to_have_value("one\ntwo")


def test_the_end_is_in_sight_after_a_look_at_the_other_mode(visit, expect):
    halfway = threading.Event()
    half = [event(f" word{number}", CODE, chat=True) for number in range(400)]
    opened, _ = visit([[*half, halfway, *half, event("", LAW, finish="stop", chat=True), DONE]])
    opened.get_by_role("button", name="Chat").click()
    opened.fill("#message", "tell")
    opened.keyboard.press("Control+Enter")
    expect(token(opened, 399)).to_be_attached()
    opened.get_by_role("button", name="Write").click()
    halfway.set()
    expect(opened.locator("#say")).to_contain_text("Done")
    opened.get_by_role("button", name="Chat").click()
    assert bars(opened)[0] == "90%"
    assert opened.locator("#chat .answers").evaluate("p => p.scrollHeight - p.clientHeight - p.scrollTop") < 2


def test_without_a_chat_template_there_is_no_chat(visit):
    opened, _ = visit(info=told(chat=False))
    opened.locator("#prompt").wait_for()
    assert opened.get_by_role("button", name="Chat").count() == 0


def test_a_message_that_was_not_answered_is_there_to_be_sent_again(visit, expect):
    answer = [event("yes", CODE, finish="stop", chat=True), DONE]
    opened, scripted = visit([refusal(400, "no room"), answer])
    opened.get_by_role("button", name="Chat").click()
    opened.fill("#message", "hello")
    opened.keyboard.press("Control+Enter")
    expect(opened.get_by_role("alert").last).to_have_text("The server refuses this (400): no room")
    assert opened.locator("#message").input_value() == "hello"
    assert opened.locator(".said").count() == 0
    opened.keyboard.press("Control+Enter")
    expect(token(opened, 0)).to_have_text("yes")
    assert scripted.asked[1][1]["messages"] == [{"role": "user", "content": "hello"}]
    assert opened.locator(".problem").count() == 0


# ---------------------------------------------------------------- what goes wrong

BROKEN = "The connection broke while the server answered."


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            refusal(400, "weft.top_k (9) must be a whole number."),
            "The server refuses this (400): weft.top_k (9) must be",
        ),
        (refusal(404, "The model `x` does not exist."), "The server refuses this (404): The model `x` does not exist"),
        (Reply(422, '{"detail": "field required"}'), "The server refuses this (422): field required"),
        (Reply(500, '{"message": "out of memory"}'), "The server failed (500): out of memory. Its log says more."),
        (Reply(502, HOSTILE, "text/html"), f"The server failed (502): {HOSTILE}"),
        (Reply(503, ""), "The server failed (503): Service Unavailable"),
        ([event("a", CODE), 0.1, CUT], BROKEN),
        ([event("a", CODE)], "The server ended the answer before it was complete."),
        ([event("a", CODE), b'data: {"error": {"message": "engine died"}}\n\n'], "The server broke off: engine died"),
        ([event("a", CODE), b"data: nonsense\n\n"], "The server sent what is no part of an answer: nonsense"),
    ],
)
def test_what_goes_wrong_is_told_in_words_and_what_came_is_kept(visit, expect, answer, said):
    opened, scripted = visit([answer, [event("again", CODE, finish="stop"), DONE]])
    write(opened)
    expect(opened.locator(".problem")).to_contain_text(said)
    assert opened.evaluate("window.hacked") is None
    assert opened.locator(".tokens span").all_inner_texts() == (["a"] if isinstance(answer, list) else [])
    assert opened.locator("#prompt").input_value() == "Once"
    opened.keyboard.press("Control+Enter")
    expect(token(opened, 0)).to_have_text("again")
    assert len(scripted.asked) == 2


def test_a_server_that_is_gone_is_told_and_asked_again(visit, expect):
    opened, scripted = visit(info=Reply(503, ""))
    expect(opened.get_by_role("alert")).to_contain_text("The server failed (503)")
    scripted.info = told()
    opened.get_by_role("button", name="Try again").click()
    write(opened, "text")
    scripted.server.shutdown()
    scripted.server.server_close()
    opened.keyboard.press("Control+Enter")
    expect(opened.locator(".problem").last).to_contain_text("The server does not answer.")
    assert opened.locator("#prompt").input_value() == "text"


def test_another_server_is_known_as_such(visit, expect):
    opened, _ = visit(info=Reply(200, "<h1>hello</h1>", "text/html"))
    expect(opened.get_by_role("alert")).to_contain_text("is not one of weft's")


def test_a_key_is_asked_for_and_kept_in_this_tab_alone(visit, expect):
    opened, scripted = visit([[event("a", CODE, finish="stop"), DONE]], key="secret")
    expect(opened.locator("#ask-why")).to_have_text("It was started with --api-key.")
    opened.locator("#key").fill("wrong")
    opened.keyboard.press("Enter")
    expect(opened.locator("#ask-why")).to_have_text("It does not take the key that it was given.")
    opened.locator("#key").fill("sécret")
    opened.keyboard.press("Enter")
    assert opened.locator("#ask").is_visible()
    opened.locator("#key").fill("secret")
    opened.get_by_role("button", name="Use this key").click()
    write(opened)
    expect(token(opened, 0)).to_have_text("a")
    kept = "() => [JSON.stringify(sessionStorage), localStorage.length, document.cookie]"
    assert opened.evaluate(kept) == ['{"weft-key":"secret"}', 0, ""]
    opened.reload()
    opened.locator("#prompt").wait_for()
    assert opened.locator("#ask").is_hidden()
    # The server was started anew, with another key, while the page was open.
    scripted.key = "other"
    scripted.answers.append([event("b", CODE, finish="stop"), DONE])
    write(opened)
    opened.locator("#key").fill("other")
    opened.keyboard.press("Enter")
    expect(token(opened, 0)).to_have_text("b")


def test_without_the_key_the_page_says_what_is_missing(visit, expect):
    opened, _ = visit(key="secret")
    opened.locator("#ask").wait_for()
    opened.keyboard.press("Escape")
    expect(opened.get_by_role("alert")).to_contain_text("The server answers nobody without its key (401).")
    opened.get_by_role("button", name="Try again").click()
    expect(opened.locator("#ask")).to_be_visible()


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stopping_leaves_the_server_and_keeps_what_came(visit, expect, how):
    opened, scripted = visit([[event("kept", CODE), threading.Event()], [event("next", LAW, finish="stop"), DONE]])
    write(opened)
    expect(token(opened, 0)).to_have_text("kept")
    opened.keyboard.press("Control+Enter")  # one answer at a time
    if how == "button":
        opened.locator("#write .stop").click()
    else:
        opened.keyboard.press("Escape")
    assert scripted.hung_up.wait(10)
    expect(opened.locator(".stopped")).to_have_text("Stopped.")
    assert opened.locator(".tokens").inner_text() == "kept"
    assert opened.locator(".problem").count() == 0
    assert len(scripted.asked) == 1
    opened.keyboard.press("Control+Enter")
    expect(token(opened, 0)).to_have_text("next")

"""What the embedded engine cannot do is refused by the field's name, and nothing is a fault of the server."""

import json

import pytest
import torch

from embedded_server import make_mixture, serving
from weft.serve.embedded.app import _MOST_BYTES
from weft.serve.embedded.stops import StopStrings

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with serving(make_mixture(tmp_path_factory.mktemp("served"))) as served:
        yield served


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_bias", {"1": 5}, "logit_bias ({'1': 5}) is not supported by the embedded engine: leave it out"),
        ("presence_penalty", 0.5, "presence_penalty (0.5) is not supported"),
        ("frequency_penalty", True, "frequency_penalty (True) is not supported"),
        ("suffix", "x", "suffix ('x') is not supported"),
        ("min_p", 0.1, "min_p (0.1) is not supported"),
        ("response_format", {"type": "json_object"}, "response_format ({'type': 'json_object'}) is not supported"),
        ("best_of", 3, "best_of (3) is not supported by the embedded engine, which returns all that it makes, n (1)"),
        ("nonsense", 1, "nonsense is no field that the embedded engine knows: leave it out"),
        ("messages", MESSAGES, "messages is no field"),
        ("max_tokens", 0, "max_tokens (0) must be a whole number of at least 1"),
        ("max_tokens", 2.5, "max_tokens (2.5) must be a whole number of at least 1"),
        ("max_tokens", 255, "the prompt (2 tokens) and max_tokens (255) need 257 positions, and the model has 256"),
        ("n", 129, "n (129) must be a whole number from 1 to 128"),
        ("n", True, "n (True) must be a whole number from 1 to 128"),
        ("temperature", -1, "temperature (-1) must be a finite number of at least 0"),
        ("temperature", "hot", "temperature ('hot') must be a finite number of at least 0"),
        ("top_p", 0, "top_p (0) must be a finite number above 0 and at most 1"),
        ("top_p", 1.1, "top_p (1.1) must be a finite number above 0 and at most 1"),
        ("top_k", -2, "top_k (-2) must be a whole number of at least -1"),
        ("repetition_penalty", 0, "repetition_penalty (0) must be a finite number above 0"),
        ("seed", 2**63, f"seed ({2**63}) must be a whole number of at least"),
        ("stop", [""], "stop (['']) must be a string or a list of at most 16 strings, none of them empty"),
        ("stop", 5, "stop (5) must be a string or a list"),
        ("stop", ["x"] * 17, "must be a string or a list of at most 16 strings"),
        ("logprobs", 21, "logprobs (21) must be a whole number from 0 to 20"),
        ("logprobs", True, "logprobs (True) must be a whole number from 0 to 20"),
        ("echo", 1, "echo (1) must be true or false"),
        ("stream", "yes", "stream ('yes') must be true or false"),
        ("stream_options", {"include_usage": True}, "stream_options ({'include_usage': True}) needs stream (False)"),
        ("prompt", None, "prompt is missing: a text, token ids, or a list of either"),
        ("prompt", [], "prompt ([]) must be a text, token ids, or a list of either"),
        ("prompt", {}, "prompt ({}) must be a text"),
        ("prompt", "", "prompt ('') has no tokens, expected at least one to continue"),
        ("prompt", [[]], "prompt ([]) has no tokens"),
        ("prompt", [5, 98], "prompt has the token id 98, expected 0 to 97"),
        ("prompt", [-1], "prompt has the token id -1, expected 0 to 97"),
        ("prompt", [10**30], "prompt has the token id 1000000"),
        ("prompt", [5, True], "prompt has 5, expected a text or a list of token ids"),
        ("prompt", ["x", None], "prompt has None, expected a text or a list of token ids"),
        ("prompt", "\ud800", "holds half of a character"),
        ("prompt", "x" * 256, "the prompt (256 tokens) and max_tokens (1) need 257 positions, and the model has 256"),
        ("prompt", ["a"] * 4097, "prompt (4097 of them) and n (1) ask for 4097 texts, expected at most 4096"),
        ("weft", {"nonsense": 1}, "weft has 'nonsense'"),
        ("model", "other", "The model 'other' does not exist. There are: mix, mix:code, mix:law, mix:base"),
    ],
)
def test_texts(field, value, message, served):
    error = served.post({"prompt": "ab", field: value}, status=404 if field == "model" else 400)["error"]
    assert message in error["message"]
    assert (error["param"] or "").partition(".")[0] in (field, "prompt", "body")
    assert error["type"] == ("NotFoundError" if field == "model" else "BadRequestError")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tools", [{"type": "function"}], "tools ([{'type': 'function'}]) is not supported"),
        ("tool_choice", "required", "tool_choice ('required') is not supported"),
        ("reasoning_effort", "high", "reasoning_effort ('high') is not supported"),
        ("prompt", "x", "prompt is no field"),
        ("echo", True, "echo is no field"),
        ("logprobs", 2, "logprobs (2) must be true or false"),
        ("top_logprobs", 2, "top_logprobs (2) needs logprobs (False) to be true"),
        ("max_completion_tokens", "x", "max_completion_tokens ('x') must be a whole number of at least 1"),
        ("messages", [], "messages ([]) must be a list of one or more"),
        ("messages", "hi", "messages ('hi') must be a list of one or more"),
        ("messages", ["hi"], 'message 1 (\'hi\') must be an object with "role" and "content"'),
        ("messages", [{"role": "user"}], "message 1 ({'role': 'user'}) has no \"content\", expected a string"),
        ("messages", [{**MESSAGES[0], "tool_calls": [1]}], "messages[0].tool_calls ([1]) is not supported"),
        ("messages", [{**MESSAGES[0], "nonsense": 1}], "messages[0].nonsense is no field"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], "weft reads text only"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            'has a list of parts as its "content", which the chat template does not know: give it as one string',
        ),
        ("messages", [{"role": "user", "content": "x" * 300}], "tokens) and max_tokens (1) need"),
    ],
)
def test_chats(field, value, message, served):
    assert message in served.post({"messages": MESSAGES, field: value}, CHAT, status=400)["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "right"), [("n", 2, "1"), ("prompt", ["a", "b"], "one text"), ("echo", True, "false")]
)
def test_shares_are_of_one_text(field, value, right, served):
    error = served.post({"prompt": "a", "weft": {"shares": True}, field: value}, status=400)["error"]
    assert error["message"] == f"{field} must be {right} where weft.shares is true"
    assert error["param"] == field


def test_texts_that_are_too_long_in_any_tokens_are_not_read(served, monkeypatch):
    monkeypatch.setattr(type(served.tokenizer), "__call__", lambda *_, **__: pytest.fail("it was read"))
    most = 4 * 256 * len("<pad>")
    expected = f"({most + 1:,} characters) must be shorter: the model has 256 positions, for which {most:,} characters"
    assert expected in served.post({"prompt": "x" * (most + 1)}, status=400)["error"]["message"]
    messages = [{"role": "user", "content": "x" * most}]
    assert "characters) must be shorter" in served.post({"messages": messages}, CHAT, status=400)["error"]["message"]


def test_what_changes_nothing_is_let_through(served):
    plain = {"max_tokens": 4, "temperature": 0}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}}
    harmless |= {"presence_penalty": 0, "frequency_penalty": 0.0, "response_format": {"type": "text"}, "seed": None}
    harmless |= {"nonsense": None, "top_k": -1, "cache_salt": "mine"}
    text = served.post({**plain, "prompt": "ab"})["choices"][0]["text"]
    assert served.post({**plain, **harmless, "prompt": "ab", "suffix": "", "best_of": 1})["choices"][0]["text"] == text
    chat = served.post({**plain, "messages": MESSAGES}, CHAT)["choices"][0]["message"]
    more = {"tools": [], "tool_choice": "none", "modalities": ["text"], "parallel_tool_calls": True}
    messages = [{**MESSAGES[0], "tool_calls": None}]
    assert served.post({**plain, **harmless, **more, "messages": messages}, CHAT)["choices"][0]["message"] == chat


def test_what_the_chat_template_refuses(served, monkeypatch):
    monkeypatch.setattr(served.tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    error = served.post({"messages": MESSAGES}, CHAT, status=400)["error"]
    assert error["message"] == "the chat template refuses the messages: no such role"
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    error = served.post({"messages": MESSAGES}, CHAT, status=400)["error"]
    assert error["message"].startswith("model 'mix' has a base model without a chat template, so it cannot chat: use")
    assert json.loads(served.request("GET", "/v1/weft")[1])["chat"] is False


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is no valid JSON (Expecting property name"),
        (b"", "the body is no valid JSON"),
        (b"\xff{}", "the body is no valid JSON ('utf-8' codec can't decode byte 0xff"),
        (b"[" * 100_000, "more than 64 levels of lists and objects in each other"),
        (b'{"prompt": ' + b"[" * 70 + b"]" * 70 + b"}", "more than 64 levels of lists and objects in each other"),
        (b"[1]", "the body ([1]) must be a JSON object"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature (nan) must be a finite number"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature (inf) must be a finite number"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "the body is no valid JSON (Exceeds the limit"),
    ],
    ids=lambda value: value[:20] if isinstance(value, bytes) else "",
)
def test_bodies_that_are_none(body, message, served):
    status, answer = served.request("POST", "/v1/completions", body)
    assert status == 400
    assert message in json.loads(answer)["error"]["message"]


def test_other_kinds_and_sizes_of_bodies_and_other_paths(served):
    status, answer = served.request("POST", "/v1/completions", b"{}", {"Content-Type": "text/plain"})
    assert (status, json.loads(answer)["error"]["message"]) == (
        415,
        "content-type ('text/plain') must be application/json",
    )
    large = b'{"prompt": "' + b"x" * _MOST_BYTES + b'"}'
    status, answer = served.request("POST", "/v1/completions", large)
    assert (status, json.loads(answer)["error"]["message"]) == (413, "the body has more than 33,554,432 bytes")
    status, answer = served.request("POST", "/v1/embeddings", {})
    assert (status, json.loads(answer)["error"]["type"]) == (404, "NotFoundError")
    status, answer = served.request("GET", "/v1/completions")
    assert (status, json.loads(answer)["error"]["message"]) == (405, "GET /v1/completions: Method Not Allowed")
    assert served.request("GET", "/health")[0] == 200


def test_weights_that_are_too_large_are_told_from_a_broken_model(served):
    error = served.post({"prompt": "a", "weft": {"global_weight": 1e38}}, status=400)["error"]
    assert error["message"].startswith('the logits are NaN or infinite with weft ({"alone":null,"global_weight":1e')
    parameter = served.engine.model.get_input_embeddings().weight
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(torch.nan)
    error = served.post({"prompt": "a"}, status=500)["error"]
    assert error["message"] == "the logits are NaN or infinite with model (mix): its weights are broken or too large"
    assert error["type"] == "InternalServerError"
    with torch.no_grad():
        parameter.copy_(kept)
    assert served.post({"prompt": "a"})["choices"][0]["finish_reason"] == "length"


def test_numbers_that_leave_nothing_to_sample_from(served):
    error = served.post({"prompt": "a", "repetition_penalty": 1e-45}, status=400)["error"]
    assert error["message"].startswith("temperature (1) and repetition_penalty (1e-45) leave no probabilities to sampl")
    assert served.post({"prompt": "a", "temperature": 1e-300})["choices"][0]["text"]
    assert served.post({"prompt": "a", "temperature": 1e300})["choices"][0]["text"]


def test_a_key_is_asked_for_under_v1_alone(tmp_path):
    with serving(make_mixture(tmp_path), api_key="schlüssel") as served:
        for path, status in (("models", 200), ("completions", 405), ("weft", 200), ("nonsense", 404)):
            for wrong in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "schlüssel".encode()}):
                assert served.request("GET", f"/v1/{path}", headers=wrong) == (401, b'{"error":"Unauthorized"}')
            right = {"Authorization": "Bearer schlüssel".encode()}
            assert served.request("GET", f"/v1/{path}", headers=right)[0] == status
        for open_to_all in ("/", "/health", "/metrics"):
            assert served.request("GET", open_to_all)[0] == 200


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["one E", "NT", " two EN", "D three"], ["one ", "ENT", " two ", ""]),
        (["EEN", "D"], ["E", ""]),
        (["STEND"], ["ST"]),
        (["a", "STO", "x"], ["a", "", "STOx"]),
        (["aaSTOP END"], ["aa"]),
    ],
)
def test_stop_strings(pieces, expected):
    stops = StopStrings(["END", "STOP"])
    assert [stops.add(piece) for piece in pieces] == expected


def test_what_was_held_back_comes_at_the_end():
    stops = StopStrings(["END"])
    assert stops.add("an EN") == "an "
    assert stops.flush() == "EN"
    assert stops.flush() == ""

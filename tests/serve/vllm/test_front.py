"""What clients choose from a served mixture, and what they are told of the gate."""

import itertools
import json
import urllib.error
import urllib.request

import pytest
import torch

import weft
from engines import NEW, generated
from servers import PROMPT, request
from weft.serve.embedded.following import following
from weft.serve.requests import Served

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]

SERVED = Served("my-mixture", ("code", "law"))
ASKED = [
    ("my-mixture", None),
    ("my-mixture:code", None),
    ("my-mixture:law", None),
    ("my-mixture:base", None),
    ("my-mixture", {"weights": {"code": 0.7, "law": 0.3}}),
    ("my-mixture", {"weights": {"law": -1}, "global_weight": 0.5}),
    ("my-mixture", {"top_k": 1}),
]


def completion(port, model, options, **more):
    body = {"model": model, "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True} | ({} if options is None else {"weft": options}) | more
    return request(port, "/v1/completions", body)


@pytest.fixture(scope="module")
def right(saved):
    tokens = {}
    for asked in ASKED:
        with following(saved[1], SERVED.choice(*asked)):
            tokens[str(asked)] = generated(saved[1], [PROMPT])[0][0]
    assert len({tuple(each) for each in tokens.values()}) == len(ASKED)
    return tokens


@pytest.mark.parametrize("salt", [{}, {"cache_salt": "mine"}], ids=["", "salted"])
def test_identical_prompts_with_different_choices_in_every_order(salt, server, right):
    for order in itertools.permutations(ASKED[:1] + ASKED[3:6]):
        for asked in order:
            answer = completion(server[0], *asked, **salt)
            assert answer["choices"][0]["token_ids"] == right[str(asked)]
            assert answer["model"] == asked[0]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_every_choice(asked, server, right):
    assert completion(server[0], *asked)["choices"][0]["token_ids"] == right[str(asked)]


def events(port, path, body):
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    posted = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(posted) as answer:
        lines = [line.decode().strip() for line in answer if line.strip()]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_shares_of_each_token_whole_and_streaming(server, saved):
    steps = list(weft.stream(saved[1], torch.tensor([PROMPT]), max_new_tokens=NEW, eos_token_id=[]))
    answer = completion(server[0], "my-mixture", {"shares": True}, return_token_ids=False)
    shares = answer["choices"][0]["weft"]["shares"]
    assert "token_ids" not in answer["choices"][0]
    body = {"model": "my-mixture", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    found = events(server[0], "/v1/completions", {**body, "stream": True, "weft": {"shares": True}})
    streamed = [row for event in found for choice in event["choices"] for row in choice["weft"]["shares"]]
    assert shares == streamed
    assert len(shares) == NEW
    for row, step in zip(shares, steps, strict=True):
        assert row == pytest.approx(step.shares, abs=1e-4)
    assert len([event for event in found if event["choices"]]) > NEW / 2  # as they come, a few together
    assert "".join(event["choices"][0]["text"] for event in found) == answer["choices"][0]["text"]


def test_shares_of_constant_weights_and_of_one_expert(server):
    for model, options, row in [
        ("my-mixture:law", {}, {"code": 0.0, "law": 1.0}),
        ("my-mixture:base", {}, {"code": 0.0, "law": 0.0}),
        ("my-mixture", {"weights": {"code": 0.25}}, {"code": 0.25, "law": 0.0}),
    ]:
        answer = completion(server[0], model, {**options, "shares": True})
        assert answer["choices"][0]["weft"]["shares"] == [row] * NEW
        assert answer["model"] == model


def test_many_streams_with_shares_and_choices_at_once(server, right):
    from concurrent.futures import ThreadPoolExecutor

    def one(asked):
        body = {"model": asked[0], "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "return_token_ids": True, "weft": {**(asked[1] or {}), "shares": True}}
        choices = [choice for event in events(server[0], "/v1/completions", body) for choice in event["choices"]]
        assert sum(len(choice["weft"]["shares"]) for choice in choices) == NEW
        return [token for choice in choices for token in choice["token_ids"]]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, ASKED * 3)) == [right[str(asked)] for asked in ASKED] * 3


def refused(port, path, body, key="secret"):
    with pytest.raises(urllib.error.HTTPError) as raised:
        request(port, path, body, key)
    return raised.value.code, json.load(raised.value)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"model": "my-mixture:lax"}, 404, "There are: my-mixture, my-mixture:code, my-mixture:law, my-mixture:base"),
        ({"weft": {"weights": {"lax": 1}}}, 400, "weft.weights has 'lax'; the experts are code, law"),
        ({"weft": {"top_k": 3}}, 400, "weft.top_k (3) must be a whole number from 1 to 2"),
        ({"weft": {"global_weight": "x"}}, 400, "weft.global_weight ('x') must be a finite number"),
        ({"weft": {"shares": True}, "n": 2}, 400, "n must be 1 where weft.shares is true"),
        ({"weft": {"shares": True}, "prompt": ["a", "b"]}, 400, "prompt must be one text where weft.shares is true"),
        ({"weft": {"shares": True}, "echo": True}, 400, "echo must be false where weft.shares is true"),
        ({"weft": {"top_k": 1}, "use_beam_search": True}, 400, "which vLLM's beams ignore"),
        ({"vllm_xargs": {"weft": "{}"}}, 400, "vllm_xargs has weft: send it as the body's own field weft"),
        ({"vllm_xargs": {"weft_shares": "a"}}, 400, "vllm_xargs has weft"),
        ({"vllm_xargs": [1], "weft": {"top_k": 1}}, 400, "vllm_xargs ([1]) must be an object"),
        ({"cache_salt": 5, "weft": {"top_k": 1}}, 400, "cache_salt (5) must be a text that is not empty"),
        ({"cache_salt": ""}, 400, "cache_salt ('') must be a text that is not empty"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_told(body, status, message, server):
    code, answer = refused(server[0], "/v1/completions", {"model": "my-mixture", "prompt": PROMPT, **body})
    assert code == status == answer["error"]["code"]
    assert message in answer["error"]["message"]
    code, answer = refused(server[0], "/v1/completions", {"model": "my-mixture", **body}, key="wrong")
    assert (code, answer) == (401, {"error": "Unauthorized"})  # nothing is told before the key is right


def test_paths_without_choices_refuse_them(server):
    body = {"model": "my-mixture", "token_ids": PROMPT, "sampling_params": {"extra_args": {"weft": "{}"}}}
    assert refused(server[0], "/inference/v1/generate", body)[0] == 400
    assert refused(server[0], "/tokenize", {"model": "my-mixture:code", "prompt": "a"})[0] == 404
    assert refused(server[0], "/tokenize", {"model": "my-mixture", "prompt": "a", "weft": {}})[0] == 400


def test_malformed_bodies_are_vllms_to_refuse(server):
    headers = {"content-type": "application/json", "authorization": "Bearer secret"}
    for raw in (b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"model": "my-mixture"}'):
        posted = urllib.request.Request(f"http://127.0.0.1:{server[0]}/v1/completions", raw, headers)
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(posted)
        assert 400 <= raised.value.code < 500
    request(server[0], "/v1/models")


def test_metrics_and_description(server, saved):
    def gate():
        with urllib.request.urlopen(f"http://127.0.0.1:{server[0]}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("weft_")}

    before = gate()
    completion(server[0], "my-mixture", None, cache_salt="to be read anew")
    completion(server[0], "my-mixture:code", None)
    after = gate()
    assert after["weft_gate_tokens_total"] - before["weft_gate_tokens_total"] == len(PROMPT) + NEW - 1
    sums = after['weft_gate_share{expert="code"}'] + after['weft_gate_share{expert="law"}']
    assert 0.5 < sums < 1.0001  # less than 1 by the tokens that kept one expert
    with pytest.raises(urllib.error.HTTPError, match="401"):
        request(server[0], "/v1/weft", key="wrong")
    found = request(server[0], "/v1/weft")
    assert found.pop("engine").startswith("vLLM ")
    assert found.pop("base") == json.loads((saved[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    scheme = "a scaling pass, then the adapted pass"
    experts = ["code", "law"]
    assert found == {"name": "my-mixture", "experts": experts, "scheme": scheme, "shares": True, "chat": True}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_the_other_kinds_of_text_follow_the_choice(path, server, saved):
    turns = [{"role": "user", "content": "contract"}]
    body = {"temperature": 0} | ({"input": turns} if path.endswith("responses") else {"messages": turns})
    body |= {"max_output_tokens": NEW} if path.endswith("responses") else {"max_tokens": NEW}

    def text(model, options=None):
        more = {"weft": options} if options else {}
        answer = request(server[0], path, {**body, "model": model, **more})
        assert answer["model"] == model
        if "choices" in answer:
            return answer["choices"][0]["message"]["content"]
        return "".join(part["text"] for part in answer.get("content") or answer["output"][-1]["content"])

    found = [text("my-mixture"), text("my-mixture:law"), text("my-mixture", {"weights": {"law": 0.0}})]
    assert len(set(found)) == 3
    assert all(found)
    assert found[2] == text("my-mixture:base")
    if "chat" not in path:
        assert refused(server[0], path, {**body, "model": "my-mixture", "weft": {"shares": True}})[0] == 400
        return
    shares = {"weft": {"shares": True}, "model": "my-mixture:law", "stream": True}
    rows = [
        row
        for event in events(server[0], path, {**body, **shares})
        for choice in event["choices"]
        for row in choice["weft"]["shares"]
    ]
    assert rows == [{"code": 0.0, "law": 1.0}] * len(rows)
    assert len(rows) > 1

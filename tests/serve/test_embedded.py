"""The embedded engine: what it answers is what the model gives, whatever is chosen for it."""

import json
import re

import pytest
import torch

from embedded_server import BATCHES, NAMES, make_mixture, serving
from models import lora
from weft.generation.stream import stream
from weft.model.model import at_own_weight

PROMPT = "the law of code"
TWO_PASSES = "a scaling pass, then the adapted pass"


@pytest.fixture(scope="module", params=[{}, {"gate_layer": 1}], ids=["two passes", "one pass"])
def served(request, tmp_path_factory):
    with serving(make_mixture(tmp_path_factory.mktemp("served"), **request.param)) as served:
        assert (served.engine.batch is not None) == (BATCHES and "gate_layer" in request.param)
        served.one_pass = "gate_layer" in request.param
        yield served


def test_greedy_tokens_are_those_of_generate(served):
    expected = served.greedy(PROMPT, 12)
    body = {"model": "mix", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answer = served.post(body)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == expected
    assert choice["text"] == served.decode(expected)
    assert choice["finish_reason"] == "length"
    assert choice["prompt_token_ids"] == served.tokens(PROMPT)[0].tolist()
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 12,
        "total_tokens": len(PROMPT) + 12,
    }
    assert answer["model"] == "mix"


def test_a_shorter_scaling_pass(tmp_path):
    with serving(make_mixture(tmp_path, scaling_pass_layers=1)) as served:
        answer = served.post({"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True})
        assert answer["choices"][0]["token_ids"] == served.greedy(PROMPT, 12)
        assert (
            answer["choices"][0]["token_ids"]
            != served.post(
                {"model": "mix:base", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
            )["choices"][0]["token_ids"]
        )


@pytest.mark.parametrize("scheme", [{}, {"gate_layer": 1}], ids=str)
def test_what_other_engines_refuse(scheme, tmp_path):
    config = lora(use_dora=True, target_modules=["q_proj", "embed_tokens", "lm_head"])
    with serving(make_mixture(tmp_path, config, allow_dora=True, **scheme)) as served:
        answer = served.post({"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True})
        assert answer["choices"][0]["token_ids"] == served.greedy(PROMPT, 12)


def chosen(served, which):
    """(what is asked for, what the model does in a block of)."""
    model = served.model
    return {
        "base": ({"model": "mix:base"}, model.disable_adapter),
        "alone": ({"model": "mix:law"}, lambda: at_own_weight(model, {"law": 1.0})),
        "weights": (
            {"model": "mix", "weft": {"weights": {"code": 0.3, "law": 2.0}}},
            lambda: model.fixed_scalings({"code": 0.3, "law": 2.0}),
        ),
    }[which]


@pytest.mark.parametrize("which", ["base", "alone", "weights"])
def test_what_is_chosen_is_followed(which, served):
    asked, block = chosen(served, which)
    with block():
        expected = served.greedy(PROMPT, 12)
    answer = served.post({**asked, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == expected != served.greedy(PROMPT, 12)
    assert answer["model"] == asked["model"]


@pytest.mark.parametrize(("name", "value"), [("top_k", 1), ("global_weight", 3.0)])
def test_the_gates_options_are_of_one_request(name, value, served):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    before = served.post(body)["choices"][0]["token_ids"]
    other = served.post({**body, "weft": {name: value}})["choices"][0]["token_ids"]
    assert served.post(body)["choices"][0]["token_ids"] == before != other
    setter = {"top_k": served.model.set_topk_lora, "global_weight": served.model.set_global_scaling_weight}[name]
    setter(value)
    try:
        assert served.greedy(PROMPT, 12) == other
    finally:
        setter({"top_k": None, "global_weight": 1.0}[name])
    both = {"weights": {"law": 1.0}, "global_weight": 0.0}
    assert served.post({**body, "weft": both})["choices"] == [
        {**served.post({**body, "model": "mix:base"})["choices"][0]}
    ]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_shares_are_those_of_steps(chat, is_stream, served):
    message = {"role": "user", "content": PROMPT}
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"messages": [message]} if chat else {"prompt": PROMPT}
    body |= {"max_tokens": 8, "temperature": 0, "weft": {"shares": True}}
    text = f"user: {PROMPT}\nassistant: " if chat else PROMPT
    steps = list(stream(served.model, text, tokenizer=served.tokenizer, max_new_tokens=8))
    answers = served.stream(body, path) if is_stream else [served.post(body, path)]
    shares = [one for answer in answers for one in answer["choices"][0]["weft"]["shares"]]
    assert len(shares) == len(steps)
    for one, step in zip(shares, steps, strict=True):
        assert one == pytest.approx(step.shares, abs=1e-5)
    assert len({round(one["code"], 4) for one in shares}) > 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"model": "mix:law"}, {"code": 0.0, "law": 1.0}),
        ({"model": "mix:base"}, {"code": 0.0, "law": 0.0}),
        ({"weft": {"weights": {"code": 0.25}}}, {"code": 0.25, "law": 0.0}),
    ],
    ids=str,
)
def test_shares_where_no_gate_decides(asked, expected, served):
    options = {**asked.get("weft", {}), "shares": True}
    answer = served.post({**asked, "prompt": PROMPT, "max_tokens": 3, "weft": options})
    assert answer["choices"][0]["weft"] == {"shares": [expected] * 3}


def test_what_streams_is_what_comes_whole(served):
    body = {"prompt": [PROMPT, "b"], "n": 2, "max_tokens": 6, "seed": 5, "logprobs": 2, "return_token_ids": True}
    whole = served.post(body)
    events = served.stream({**body, "stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events[:-1])
    for choice in whole["choices"]:
        parts = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        assert parts[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
        told = {name: [one for part in parts for one in part["logprobs"][name]] for name in choice["logprobs"]}
        for name in ("tokens", "text_offset"):
            assert told[name] == choice["logprobs"][name]
        # Texts that are run together are summed in another order than texts that come one by one.
        assert told["token_logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        for ours, theirs in zip(told["top_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]


def test_samples_differ_and_a_seed_makes_them_again(served):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 1.5, "seed": 1}
    texts = [choice["text"] for choice in served.post({**body, "n": 3})["choices"]]
    assert len(set(texts)) == 3
    assert [choice["text"] for choice in served.post({**body, "n": 3})["choices"]] == texts
    assert served.post(body)["choices"][0]["text"] == texts[0]
    steps = stream(
        served.model, PROMPT, tokenizer=served.tokenizer, max_new_tokens=8, temperature=1.5, seed=1, top_k=9, top_p=0.8
    )
    sampled = served.post({**body, "top_k": 9, "top_p": 0.8})["choices"][0]["text"]
    assert sampled == "".join(step.text for step in steps)
    assert served.post({"prompt": PROMPT, "max_tokens": 8, "top_k": 1})["choices"][0]["text"] == served.decode(
        served.greedy(PROMPT, 8)
    )


def test_prompts_as_tokens_are_prompts_as_texts(served):
    body = {"max_tokens": 5, "temperature": 0}
    ids = served.tokens(PROMPT)[0].tolist()
    forms = [PROMPT, [PROMPT], ids, [ids], [PROMPT, ids]]
    answers = [[one["text"] for one in served.post({**body, "prompt": form})["choices"]] for form in forms]
    assert answers == [answers[0]] * 4 + [answers[0] * 2]


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_ends_the_text_before_it(is_stream, served):
    tokens = served.greedy(PROMPT, 24)
    text = served.decode(tokens)
    stop = text[9:13]
    end = text.index(stop)
    body = {
        "prompt": PROMPT,
        "max_tokens": 24,
        "temperature": 0,
        "stop": ["never there", stop],
        "return_token_ids": True,
    }
    answers = served.stream(body) if is_stream else [served.post(body)]
    choices = [answer["choices"][0] for answer in answers]
    assert "".join(choice["text"] for choice in choices) == text[:end]
    assert choices[-1]["finish_reason"] == "stop"
    read = [token for choice in choices for token in choice["token_ids"]]
    assert read == tokens[: len(read)]
    assert stop in served.decode(read)
    assert stop not in served.decode(read[:-1])


def test_a_text_ends_at_its_end_token_which_is_no_text(tmp_path):
    folder = make_mixture(tmp_path)
    with serving(folder) as served:
        tokens = served.greedy(PROMPT, 12)
    end = tokens[5]
    settings = tmp_path / "base" / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": [end]}))
    expected = tokens[: tokens.index(end) + 1]
    with serving(folder) as served:
        body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
        choice = served.post(body)["choices"][0]
        assert choice["token_ids"] == expected == served.greedy(PROMPT, 12)
        assert choice["text"] == served.decode(expected[:-1])
        assert choice["finish_reason"] == "stop"
        assert served.post({**body, "ignore_eos": True})["choices"][0]["token_ids"] == tokens


def test_log_probabilities_are_the_models(served):
    tokens = served.greedy(PROMPT, 6)
    ids = torch.cat([served.tokens(PROMPT), torch.tensor([tokens])], 1)
    with torch.no_grad():
        rows = served.model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    expected = [float(row[token]) for row, token in zip(rows, tokens, strict=True)]
    body = {"max_tokens": 6, "temperature": 0}
    of_text = served.post({**body, "prompt": PROMPT, "logprobs": 3})["choices"][0]
    assert of_text["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)
    assert [max(top.values()) for top in of_text["logprobs"]["top_logprobs"]] == pytest.approx(expected, abs=1e-4)
    offsets = [*of_text["logprobs"]["text_offset"], len(of_text["text"])]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    chat = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2, **body}
    told = served.post(chat, "/v1/chat/completions")["choices"][0]["logprobs"]["content"]
    for one in told:
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] > one["top_logprobs"][1]["logprob"]
        assert bytes(one["bytes"]).decode() == one["token"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_prompt_that_is_part_of_the_answer_is_scored(number, served):
    with torch.no_grad():
        rows = served.model(input_ids=served.tokens(PROMPT)).logits[0].log_softmax(-1)
    ids = served.tokens(PROMPT)[0].tolist()
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
    body = {"prompt": PROMPT, "max_tokens": number, "temperature": 0, "echo": True, "logprobs": 1}
    choice = served.post(body)["choices"][0]
    scores = choice["logprobs"]["token_logprobs"]
    assert scores[0] is None is choice["logprobs"]["top_logprobs"][0]
    assert scores[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(scores) == len(ids) + number
    assert choice["text"] == PROMPT + served.decode(served.greedy(PROMPT, 1) if number else [])
    assert choice["logprobs"]["text_offset"][: len(ids)] == list(range(len(PROMPT)))
    events = served.stream(body)
    assert "".join(event["choices"][0]["text"] for event in events) == choice["text"]


def test_models_and_what_is_told_of_them(served):
    status, answer = served.request("GET", "/v1/models")
    assert status == 200
    assert [model["id"] for model in json.loads(answer)["data"]] == ["mix", "mix:code", "mix:law", "mix:base"]
    assert json.loads(served.request("GET", "/v1/models/mix:law")[1])["id"] == "mix:law"
    status, answer = served.request("GET", "/v1/models/mix:lax")
    assert (status, json.loads(answer)["error"]["code"]) == (404, 404)
    about = json.loads(served.request("GET", "/v1/weft")[1])
    assert about.pop("engine").startswith("embedded (transformers ")
    assert about.pop("base").endswith("base")
    assert about == {
        "name": "mix",
        "experts": list(NAMES),
        "scheme": "one pass, the gate at decoder layer 1" if served.one_pass else TWO_PASSES,
        "shares": True,
        "chat": True,
    }
    assert served.request("GET", "/health") == (200, b"")
    status, page = served.request("GET", "/")
    assert (status, page[:15].lower()) == (200, b"<!doctype html>")


def gate(served):
    text = served.request("GET", "/metrics")[1].decode()
    found = {name: float(value) for name, value in re.findall(r"^(weft_\S+) (\S+)$", text, flags=re.M)}
    number = found["weft_gate_tokens_total"]
    return number, {name: number * found[f'weft_gate_share{{expert="{name}"}}'] for name in NAMES}, found


def test_metrics_tell_the_gates_mean_shares(served):
    served.post({"prompt": PROMPT, "max_tokens": 1})
    before, sums_before, first = gate(served)
    answer = served.post({"prompt": PROMPT, "max_tokens": 5, "temperature": 0})
    served.post({"model": "mix:law", "prompt": PROMPT, "max_tokens": 5})  # for which no gate decides
    after, sums_after, last = gate(served)
    read = served.tokens(PROMPT + answer["choices"][0]["text"])[:, : len(PROMPT) + 4]
    assert after - before == read.shape[1]
    with torch.no_grad():
        served.model(input_ids=read)
    shares = served.model.passes.followed()[0].mean(1).sum(0).tolist()
    for name, share in zip(NAMES, shares, strict=True):
        assert sums_after[name] - sums_before[name] == pytest.approx(share, abs=1e-3)
    assert last["weft_generation_tokens_total"] - first["weft_generation_tokens_total"] == 10
    name = 'weft_requests_total{path="/v1/completions",status="200"}'
    assert last[name] - first[name] == 2

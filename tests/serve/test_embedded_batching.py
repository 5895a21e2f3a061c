"""Requests that are answered together get what they would get alone, whatever happens to the others."""

import json
import queue
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import weft
from embedded_server import BATCHES, ascii_tokenizer, make_mixture, serving
from models import weft_model
from weft.serve.embedded import batching
from weft.serve.embedded.engine import Engine
from weft.serve.embedded.metrics import Metrics

PROMPTS = [f"{'text ' * number}{number}" for number in range(1, 9)]

pytestmark = pytest.mark.skipif(not BATCHES, reason="transformers' continuous batching cannot be paused before 5.23")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_mixture(tmp_path_factory.mktemp("served"), gate_layer=1)


@pytest.fixture(scope="module")
def served(folder):
    with serving(folder) as served:
        assert served.engine.batch is not None
        yield served


def bodies(number=20):
    """Requests of every kind, and others that must not disturb them."""
    plain = [{"prompt": prompt, "temperature": 0} for prompt in PROMPTS]
    sampled = [{"prompt": prompt, "temperature": 1.2, "seed": seed, "n": 2} for seed, prompt in enumerate(PROMPTS[:3])]
    chosen = [
        {"prompt": PROMPTS[0], "temperature": 0, "weft": {"weights": {"law": 1.0}}},
        {"prompt": PROMPTS[1], "temperature": 0, "model": "mix:base"},
        {"prompt": PROMPTS[2], "temperature": 0, "model": "mix:code"},
        {"prompt": PROMPTS[3], "temperature": 0, "weft": {"top_k": 1}},
        {"prompt": PROMPTS[4], "temperature": 0, "weft": {"shares": True}, "logprobs": 2},
        {"prompt": PROMPTS[5], "temperature": 0, "repetition_penalty": 1.5},
        {"prompt": PROMPTS[6], "temperature": 0, "echo": True, "logprobs": 1},
    ]
    return [{**body, "max_tokens": number, "return_token_ids": True} for body in [*plain, *sampled, *chosen]]


def told(choice):
    return choice["token_ids"], choice["text"], choice["finish_reason"]


def assert_alike(one, other):
    assert [told(choice) for choice in one["choices"]] == [told(choice) for choice in other["choices"]]
    for ours, theirs in zip(one["choices"], other["choices"], strict=True):
        for mine, its in zip(
            ours.get("weft", {}).get("shares", []), theirs.get("weft", {}).get("shares", []), strict=True
        ):
            assert mine == pytest.approx(its, abs=1e-5)
        if ours["logprobs"]:
            assert ours["logprobs"]["token_logprobs"] == pytest.approx(theirs["logprobs"]["token_logprobs"], abs=1e-4)


@pytest.fixture(scope="module")
def alone(folder):
    """The answers of an engine that writes one text after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching.Batch, "where_exact", classmethod(lambda *_: None))
        with serving(folder) as served:
            answers = [served.post(body) for body in bodies()]
            assert answers[0]["choices"][0]["token_ids"] == served.greedy(PROMPTS[0], 20)
            return answers


def together(served, wanted):
    with ThreadPoolExecutor(len(wanted)) as pool:
        return list(pool.map(served.post, wanted))


def test_requests_in_one_batch_get_what_they_get_alone(served, alone):
    for answer, expected in zip(together(served, bodies()), alone, strict=True):
        assert_alike(answer, expected)
    for _ in range(200):
        if served.engine.running == 0:
            break
        time.sleep(0.02)
    assert (served.engine.running, served.engine.waiting) == (0, 0)


@pytest.mark.parametrize("tokens", [pytest.param(160, marks=pytest.mark.slow), 64])  # of 64 a text may have 32
def test_a_small_cache_and_texts_that_outgrow_it(tokens, folder, alone, monkeypatch):
    with serving(folder) as served:
        served.engine.batch.close()
        served.engine.batch = batching.Batch(served.engine.model, tokens, served.engine._alone.put)
        for answer, expected in zip(together(served, bodies()), alone, strict=True):
            assert_alike(answer, expected)


def test_the_token_that_ends_texts_in_the_manager_may_be_in_a_text(served, alone, monkeypatch):
    monkeypatch.setattr(served.engine.batch, "_end", alone[0]["choices"][0]["token_ids"][5])
    for answer, expected in zip(together(served, bodies()), alone, strict=True):
        assert_alike(answer, expected)


def test_bases_of_many_kinds(decoder):
    model = weft_model(decoder, gate_layer=1)
    engine = Engine(model, ascii_tokenizer(), Metrics("012"))
    assert (engine.batch is not None) == (decoder[0] != "bloom")  # whose attention is not sdpa
    prompts = [(5, 6), (5, 6, 7, 8), (9, 8, 7, 6, 5, 4, 3)]
    delivered = [queue.SimpleQueue() for _ in prompts]
    for prompt, of_text in zip(prompts, delivered, strict=True):
        wanted = replace(batching._greedy([]), prompts=(batching.Prompt(prompt, "", 20),))
        engine.submit(wanted, of_text.put)
    found = [batching._tokens(of_text) for of_text in delivered]
    engine.close()
    for prompt, tokens in zip(prompts, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert tokens == expected[0, len(prompt) :].tolist()


def test_who_is_in_the_batch_runs_together(served):
    long = {"prompt": "a", "temperature": 0, "max_tokens": 200}
    seen = []
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(served.post, long) for _ in range(4)]
        while not all(one.done() for one in waiting):
            seen.append(served.engine.running)
            time.sleep(0.002)
    assert max(seen) > 1


@pytest.mark.parametrize("model", ["mix", "mix:law"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_hangs_up_ends_the_answer(model, stream, served):
    body = json.dumps({"model": model, "prompt": "a", "max_tokens": 240, "n": 100, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", served.port)) as client:
        client.sendall(f"{head}\r\n\r\n".encode() + body)
        if stream:
            assert b"200 OK" in client.recv(100)
        else:
            while served.engine.running == 0:
                time.sleep(0.001)
    start = time.monotonic()
    while served.engine.running or served.engine.waiting:
        time.sleep(0.005)
        assert time.monotonic() - start < 10
    assert served.request("GET", "/health")[0] == 200


def test_a_batch_that_fails_is_told_and_begun_anew(served, monkeypatch):
    manager = served.engine.batch._manager
    monkeypatch.setattr(manager, "_generation_step", lambda: 1 / 0)
    with ThreadPoolExecutor(9) as pool:
        wanted = [{"prompt": "a", "weft": {"weights": {"law": 1}}}, *[{"prompt": "a"}] * 8]
        answers = list(pool.map(lambda body: served.request("POST", "/v1/completions", body), wanted))
    assert answers[0][0] == 200  # which was not in the batch
    errors = [json.loads(answer)["error"] for status, answer in answers if status == 500]
    assert errors  # who came later has an answer
    for error in errors:
        assert error["type"] == "InternalServerError"
        assert "division by zero" in error["message"] or batching._FAILED in error["message"]
    assert served.post({"prompt": "a"})["choices"][0]["finish_reason"] == "length"
    assert served.engine.batch._manager is not manager


def test_what_fails_in_one_request_fails_there_alone(served, alone):
    from weft.generation.sampling import Sampler

    call = Sampler.__call__

    def broken(self, ids, logits):
        if self.seed == 13:
            raise ZeroDivisionError("here")
        return call(self, ids, logits)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(Sampler, "__call__", broken)
        wrong = [pool.submit(served.request, "POST", "/v1/completions", {"prompt": "a", "seed": 13}) for _ in range(2)]
        for answer, expected in zip(together(served, bodies()[:4]), alone[:4], strict=True):
            assert_alike(answer, expected)
        assert [one.result()[0] for one in wrong] == [500, 500]
        assert b"ZeroDivisionError: here" in wrong[0].result()[1]


@pytest.mark.parametrize("wrong", [[], RuntimeError("no such attention"), KeyboardInterrupt()], ids=repr)
def test_a_trial_that_fails_leaves_nothing_behind(wrong, folder, monkeypatch):
    def trial(self, tokenizer, device):
        self._start()
        if wrong == []:
            return wrong
        raise wrong

    monkeypatch.setattr(batching.Batch, "_trial", trial)
    model, before = weft.from_pretrained(str(folder)), threading.active_count()
    base = model.get_base_model()
    hooks = len(base._forward_hooks)
    if isinstance(wrong, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            batching.Batch.where_exact(model, ascii_tokenizer(), print)
    else:
        assert batching.Batch.where_exact(model, ascii_tokenizer(), print) is None
    assert len(base._forward_hooks) == hooks
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before


def test_threads_end_with_the_server(folder):
    before = threading.active_count()
    with serving(folder) as served, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(served.request, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 250, "n": 128})
        while served.engine.running == 0:
            time.sleep(0.001)
        served.engine.stop()
        status, error = answer.result()
        assert (status, json.loads(error)["error"]["message"]) == (500, "Stopped: the server is shutting down")
        assert served.request("POST", "/v1/completions", {"prompt": "a"})[0] == 500
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.05)
    assert threading.active_count() <= before

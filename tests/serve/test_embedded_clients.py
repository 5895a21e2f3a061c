"""Clients that people have, unmodified, against the embedded engine."""

import json
import shutil
import subprocess
import time

import pytest
import torch

from clients import PAIRS, check_log_likelihoods, check_weft_options, lm_eval
from embedded_server import make_mixture, serving

PROMPT = "the law of code"
MESSAGES = [{"role": "user", "content": PROMPT}]
pytestmark = pytest.mark.filterwarnings("ignore")  # the clients' own


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = make_mixture(tmp_path_factory.mktemp("served"), gate_layer=1)
    with serving(folder, api_key="secret") as served:
        served.base = str(folder.parent / "base")
        yield served


def chat_text(served, number):
    return served.decode(served.greedy(f"user: {PROMPT}\nassistant: ", number))


def test_the_openai_package(served):
    openai = pytest.importorskip("openai")
    check_weft_options(served.url, PROMPT)
    with openai.OpenAI(base_url=served.url, api_key="secret", max_retries=0) as client:
        assert client.models.retrieve("mix:base").id == "mix:base"
        answer = client.completions.create(model="mix", prompt=PROMPT, max_tokens=8, temperature=0)
        assert answer.choices[0].text == served.decode(served.greedy(PROMPT, 8))
        options = {"model": "mix", "messages": MESSAGES, "max_completion_tokens": 8, "temperature": 0}
        chat = client.chat.completions.create(**options, logprobs=True, top_logprobs=2)
        assert chat.choices[0].message.content == chat_text(served, 8)
        assert len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens == 8
        stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks[:-1]) == chat_text(served, 8)
        assert chunks[-1].usage.completion_tokens == 8


def test_a_stream_that_is_closed_ends_the_answer(served):
    openai = pytest.importorskip("openai")
    body = {"model": "mix:law", "prompt": "a", "max_tokens": 250, "n": 50, "stream": True}
    with openai.OpenAI(base_url=served.url, api_key="secret") as client, client.completions.create(**body) as stream:
        next(iter(stream))
    for _ in range(500):
        if not served.engine.running + served.engine.waiting:
            break
        time.sleep(0.01)
    assert (served.engine.running, served.engine.waiting) == (0, 0)


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(served):
    body = {"model": "mix", "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    command = ["curl", "-sS", "-N", f"{served.url}/chat/completions", "-H", "Content-Type: application/json", "-d"]
    key = ["-H", "Authorization: Bearer secret"]
    answer = subprocess.run([*command, json.dumps(body), *key], capture_output=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["message"]["content"] == chat_text(served, 6)
    streamed = json.dumps({**body, "stream": True})
    events = subprocess.run([*command, streamed, *key], capture_output=True, check=True).stdout.decode()
    assert events.startswith("data: {")
    assert events.endswith("data: [DONE]\n\n")
    refused = subprocess.run([*command, json.dumps(body)], capture_output=True, check=True).stdout
    assert json.loads(refused) == {"error": "Unauthorized"}


def test_langchain(served):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": served.url, "api_key": "secret", "temperature": 0, "max_retries": 0}
    chat = langchain.ChatOpenAI(model="mix", max_tokens=6, **options)
    assert chat.invoke(PROMPT).content == chat_text(served, 6)
    assert "".join(chunk.content for chunk in chat.stream(PROMPT)) == chat_text(served, 6)
    text = langchain.OpenAI(model="mix", max_tokens=6, **options)
    assert text.invoke(PROMPT) == served.decode(served.greedy(PROMPT, 6))
    assert "".join(text.stream(PROMPT)) == served.decode(served.greedy(PROMPT, 6))


def test_lm_evals_log_likelihoods_are_those_of_weft_eval(served):
    found, texts = lm_eval(served.url, served.base)
    check_log_likelihoods(found, served.model, lambda text: served.tokens(text)[0].tolist())
    for (first, second), (_, is_greedy) in zip(PAIRS, found, strict=True):
        tokens = served.tokens(first + second)
        with torch.no_grad():
            best = served.model(input_ids=tokens).logits[0, len(first) - 1 : -1].argmax(-1)
        assert is_greedy == torch.equal(best, tokens[0, len(first) :])
    assert texts == [served.decode(served.greedy("the law", 6)).partition("z")[0]]

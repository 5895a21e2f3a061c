"""Clients that people have, unmodified, against vLLM with a mixture in it."""

import json
import shutil
import subprocess

import pytest
import torch

from clients import check_log_likelihoods, check_weft_options, lm_eval
from embedded_server import ascii_tokenizer, make_mixture
from servers import started
from weft import from_pretrained

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]

TEXT = "the law of code"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    sizes = {"hidden_size": 128, "intermediate_size": 96}  # vLLM's attention wants heads of 32
    return make_mixture(tmp_path_factory.mktemp("clients"), sizes=sizes, gate_layer=1)


@pytest.fixture(scope="module")
def model(place):
    return from_pretrained(str(place)).eval()


@pytest.fixture(scope="module")
def port(place):
    with started(place) as (port, *_):
        yield port


def url(port):
    return f"http://127.0.0.1:{port}/v1"


def written(model, text, number):
    """The greedy continuation of a text, as a text."""
    tokenizer = ascii_tokenizer()
    ids = tokenizer(text).input_ids
    with torch.no_grad():
        found = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=number, do_sample=False, pad_token_id=0)
    return tokenizer.decode(found[0, len(ids) :], skip_special_tokens=True)


def test_the_openai_package(port, model):
    openai = pytest.importorskip("openai")
    check_weft_options(url(port), TEXT)
    with openai.OpenAI(base_url=url(port), api_key="secret", max_retries=0) as client:
        answer = client.completions.create(model="mix", prompt=TEXT, max_tokens=8, temperature=0)
        assert answer.choices[0].text == written(model, TEXT, 8)
        messages = [{"role": "user", "content": TEXT}]
        options = {"model": "mix", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
        chat = client.chat.completions.create(**options).choices[0].message.content
        chunks = client.chat.completions.create(**options, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat


def test_several_texts_several_answers_and_stop_strings(port, model):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url(port), api_key="secret", max_retries=0) as client:
        options = {"model": "mix", "prompt": [TEXT, "a"], "max_tokens": 8, "temperature": 1e-3, "n": 2}
        texts = [choice.text for choice in client.completions.create(**options).choices]
        assert texts == [written(model, TEXT, 8)] * 2 + [written(model, "a", 8)] * 2
        whole = written(model, TEXT, 20)
        stop = whole[6:8]
        answer = client.completions.create(model="mix", prompt=TEXT, max_tokens=20, temperature=0, stop=stop)
        assert answer.choices[0].text == whole.partition(stop)[0]
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(port, model):
    body = {"model": "mix", "prompt": TEXT, "max_tokens": 6, "temperature": 0}
    command = [
        "curl",
        "-sS",
        "-N",
        f"{url(port)}/completions",
        "-H",
        "Content-Type: application/json",
        "-d",
        json.dumps(body),
    ]
    answer = subprocess.run([*command, "-H", "Authorization: Bearer secret"], capture_output=True, check=True).stdout
    assert json.loads(answer)["choices"][0]["text"] == written(model, TEXT, 6)
    refused = subprocess.run(command, capture_output=True, check=True).stdout
    assert json.loads(refused) == {"error": "Unauthorized"}
    page = subprocess.run(["curl", "-sS", "-i", f"http://127.0.0.1:{port}/"], capture_output=True, check=True).stdout
    assert b"frame-ancestors 'none'" in page
    assert b"<!doctype html>" in page.lower()


def test_langchain(port, model):
    langchain = pytest.importorskip("langchain_openai")
    options = {"base_url": url(port), "api_key": "secret", "temperature": 0, "max_retries": 0}
    text = langchain.OpenAI(model="mix", max_tokens=6, **options)
    assert text.invoke(TEXT) == written(model, TEXT, 6)
    assert "".join(text.stream(TEXT)) == written(model, TEXT, 6)
    chat = langchain.ChatOpenAI(model="mix", max_tokens=6, **options)
    assert chat.invoke(TEXT).content == "".join(chunk.content for chunk in chat.stream(TEXT))


def test_lm_evals_log_likelihoods_are_those_of_weft_eval(port, place, model):
    found, texts = lm_eval(url(port), str(place.parent / "base"))
    check_log_likelihoods(found, model, lambda text: ascii_tokenizer()(text).input_ids)
    assert texts == [written(model, "the law", 6).partition("z")[0]]

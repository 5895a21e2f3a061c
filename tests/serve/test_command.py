"""`weft serve`, with a real server: what a client gets is what `generate` writes."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from engines import NEW, generated, sharpen

import weft
from models import lora, save_adapter, tiny_llama, tiny_tokenizer
from weft.cli import main

pytestmark = pytest.mark.serve

PROMPT = [5, 9, 33, 77, 120]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture that names its base, and the model."""
    place = tmp_path_factory.mktemp("serve")

    def base():
        sizes = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 512}
        return tiny_llama(vocab_size=len(tiny_tokenizer()), **sizes)

    base().save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    adapters = {name: save_adapter(base(), lora(), place / name, seed) for seed, name in enumerate(("code", "law"), 1)}
    model = sharpen(weft.from_adapters(str(place / "base"), adapters)).eval()
    model.save_pretrained(place / "my-mixture")
    return place / "my-mixture", model


def request(port, path, body=None, key="secret"):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def server(folder):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "weft", "serve", str(folder[0]), "--port", str(port), "--api-key", "secret"]
    command += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--block-size", "32"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ)
    ) as run:
        first = next(line for line in run.stdout if "serves" in line)  # what vLLM says at its import may come before
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                assert run.poll() is None, run.stdout.read()
                time.sleep(0.5)
        yield port, first
        run.terminate()
        run.wait(60)


def test_it_says_in_one_line_what_runs(server, folder):
    port, first = server
    base = json.loads((folder[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert first.endswith(
        f"serves my-mixture, 2 experts (code, law) of {base}: a scaling pass, then the adapted pass; "
        f"http://127.0.0.1:{port}/v1\n"
    )


def test_clients_get_what_generate_writes(server, folder):
    port, _ = server
    assert [model["id"] for model in request(port, "/v1/models")["data"]] == ["my-mixture"]
    body = {"model": "my-mixture", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    answer = request(port, "/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == generated(folder[1], [PROMPT])[0][0]


def test_the_key_is_asked_for(server):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        request(server[0], "/v1/models", key="wrong")


def test_a_base_that_vllm_does_not_know_is_refused(folder, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert main(["serve", str(folder[0]), "--base", str(tmp_path / "base")]) == 1
    assert "is of the classes ['T5Model'], none of which is among vLLM's text models" in capsys.readouterr().err

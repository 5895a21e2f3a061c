"""`weft serve` in a process of its own, with a tiny mixture."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest

import weft
from engines import sharpen
from models import lora, save_adapter, tiny_llama, tiny_tokenizer

PROMPT = [5, 9, 33, 77, 120]
FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--block-size", "32"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
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


@contextlib.contextmanager
def started(folder, *flags, program=("-m", "weft", "serve"), **variables):
    """`weft serve` of a mixture, or another program with its flags: (port, its first line, the process)."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, *program, str(folder), "--port", str(port), "--api-key", "secret"]
    command += [*FLAGS, *flags]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as run:
        try:
            said = []  # vLLM may say something before
            for line in run.stdout:
                said.append(line)
                if "serves" in line:
                    break
            else:
                raise AssertionError("it ended without serving:\n" + "".join(said))
            first = said[-1]
            threading.Thread(target=run.stdout.read, daemon=True).start()  # a full pipe would stop it
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                except OSError:
                    assert run.poll() is None
                    time.sleep(0.5)
            yield port, first, run
        finally:
            run.terminate()
            run.wait(60)


@pytest.fixture(scope="session")
def server(saved):
    with started(saved[0]) as (port, first, _):
        yield port, first

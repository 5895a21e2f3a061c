"""Several engines behind one address: what a mixture writes there is what `generate` writes."""

import os
import socket
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engines import NEW, generated
from servers import FLAGS, PROMPT, request, started
from weft.serve.embedded.following import following
from weft.serve.requests import Served

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]

SERVED = Served("my-mixture", ("code", "law"))


ASKED = [("my-mixture", None), ("my-mixture:law", None), ("my-mixture", {"weights": {"code": 0.7}})]
EXAMPLES = Path(__file__).parents[3] / "examples/serve"


@pytest.fixture(scope="module")
def right(saved):
    """What `generate` writes for each of what is asked."""
    tokens = []
    for each in ASKED:
        with following(saved[1], SERVED.choice(*each)):
            tokens.append(generated(saved[1], [PROMPT])[0][0])
    return tokens


def check_answers(port, right):
    def one(each):
        body = {"model": each[0], "prompt": PROMPT, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "weft": {**(each[1] or {}), "shares": True}}
        return request(port, "/v1/completions", body)["choices"][0]

    with ThreadPoolExecutor(8) as pool:
        for choice, tokens in zip(pool.map(one, ASKED * 6), right * 6, strict=True):
            assert choice["token_ids"] == tokens
            assert all(choice["weft"]["shares"])
            assert len(choice["weft"]["shares"]) == NEW


def test_two_engines_of_vllms_data_parallelism(saved, right):
    with started(saved[0], "--data-parallel-size", "2", VLLM_CPU_OMP_THREADS_BIND="0|1") as (port, *_):
        check_answers(port, right)


def test_engines_on_two_machines(saved, right):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    flags = ["--data-parallel-size", "2", "--data-parallel-size-local", "1"]
    flags += ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(port)]
    command = [sys.executable, "-m", "weft", "serve", saved[0], *FLAGS, *flags]
    command += ["--headless", "--data-parallel-start-rank", "1"]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as second:
        try:
            with started(saved[0], *flags, VLLM_CPU_OMP_THREADS_BIND="0") as (port, *_):
                check_answers(port, right)
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    assert b'vllm:num_requests_running{engine="1"' in answer.read()
        finally:
            second.terminate()
            second.wait(60)


def test_two_replicas_of_ray_serve(saved, right):
    pytest.importorskip("ray.serve")
    # On two busy cores Ray's proxy takes more than the five seconds after which Ray would start another.
    variables = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "RAY_USAGE_STATS_ENABLED": "0"}
    variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    with started(saved[0], program=[EXAMPLES / "ray_serve.py"], **variables) as (port, first, _):
        assert "2 replicas: " in first
        check_answers(port, right)
        births = set()
        for _ in range(20):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                births |= {line for line in answer if line.startswith(b"vllm:prompt_tokens_created")}
        assert len(births) == 2

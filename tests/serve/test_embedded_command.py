"""`weft serve` without vLLM: what it says, what it refuses, and how it ends."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import pytest

from embedded_server import BATCHES, make_mixture
from weft.cli import main
from weft.errors import ConfigError
from weft.options import ServeOptions
from weft.serve.command import _refuse_misspelt
from weft.serve.embedded import server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_mixture(tmp_path_factory.mktemp("served"))


@pytest.mark.parametrize(
    ("scheme", "sign", "status"),
    [
        ({}, signal.SIGINT, 130),
        pytest.param({"gate_layer": 1}, signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["two passes", "one pass"],
)
def test_it_says_what_runs_and_ends_when_it_is_told(scheme, sign, status, tmp_path):
    folder = make_mixture(tmp_path, **scheme)
    command = [sys.executable, "-m", "weft", "serve", str(folder), "--engine", "embedded", "--port", "0"]
    # Where the tests run in the background of a shell, it has told them to ignore Ctrl-C.
    usual = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **usual) as process:
        try:
            line = process.stdout.readline()
            found = re.fullmatch(
                r"embedded engine \(transformers \S+\) serves mix, 2 experts \(code, law\) of \S+/base: (.+); "
                r"(http://127\.0\.0\.1:\d+/v1); (.+)\n",
                line,
            )
            assert found, (line, process.stderr.read())
            one_by_one = ("a scaling pass, then the adapted pass", server._ONE_BY_ONE)
            assert found.group(1, 3) == (
                ("one pass, the gate at decoder layer 1", server._TOGETHER if BATCHES else server._ONE_BY_ONE)
                if scheme
                else one_by_one
            )
            with urllib.request.urlopen(found[2].replace("/v1", "/health")) as answer:
                assert answer.status == 200
            # Somebody who is in the midst of an answer.
            body = b'{"prompt": "a", "max_tokens": 250, "n": 128, "stream": true}'
            request = urllib.request.Request(f"{found[2]}/completions", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request) as answer:
                answer.readline()
                process.send_signal(sign)
                assert b"the server is shutting down" in answer.read()
            process.wait(30)
            assert process.returncode == status
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()


def test_what_is_refused_before_anything_is_loaded(folder, capsys, monkeypatch):
    embedded = ["serve", str(folder), "--engine", "embedded"]

    def said(*flags):
        assert main([*embedded, *flags]) == 1
        return capsys.readouterr().err

    monkeypatch.setattr(server, "load", lambda options: pytest.fail("it was loaded"))
    assert (
        "weft serve has no --max-model-len, --enforce-eager with --engine embedded: leave it out (weft serve --help)"
        in said("--max-model-len", "64", "--enforce-eager")
    )
    for flag, own in (("--prot", "--port"), ("--api_kye", "--api-key"), ("--hosts", "--host")):
        assert f"weft serve: error: {flag} is no option: did you mean {own}?" in said(f"{flag}=1")
    assert "api_key ('') must not be empty: leave it out to ask for none" in said("--api-key", "")
    assert "port (70000) must be from 0 to 65535, where 0 takes a free one" in said("--port", "70000")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"host (127.0.0.1) and port ({port}) cannot be listened on: Address already in use" in said(
            "--port", port
        )
    assert "host (no.such.host.invalid) and port (0) cannot be listened on" in said(
        "--host", "no.such.host.invalid", "--port", "0"
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert (
        'weft serve with --engine embedded needs uvicorn, which is not installed here: pip install "weft[serve]"'
        in said()
    )


def test_what_vllm_knows_is_handed_on_however_near_it_is():
    _refuse_misspelt(["--prot", "1", "--hosts=2"], {"--prot", "--hosts"}.__contains__)
    _refuse_misspelt(["--seed", "1", "--dtype", "float32", "--max-model-len=64", "-tp", "--model-impl", "x"])
    with pytest.raises(ConfigError, match=r"--hosts is no option: did you mean --host\?"):
        _refuse_misspelt(["--prot", "1", "--hosts=2"], {"--prot"}.__contains__)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is here")
def test_vllms_flags_need_vllm(folder, capsys):
    assert main(["serve", str(folder), "--max-model-len", "64"]) == 1
    error = capsys.readouterr().err
    assert "weft serve has no --max-model-len without vLLM, which is not installed here: leave it out" in error


def test_no_thread_is_left_where_the_base_is_missing(folder):
    before = threading.active_count()
    options = ServeOptions(str(folder), base=os.fspath(folder / "nothing"), port=0)
    with pytest.raises(ValueError, match="nothing"):
        server.serve_embedded(options)
    assert threading.active_count() == before

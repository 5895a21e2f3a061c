"""`weft serve`, with a real server: what a client gets is what `generate` writes."""

import importlib.metadata
import json
import sys
import urllib.error

import pytest

from engines import NEW, generated
from servers import PROMPT, request
from weft.cli import main
from weft.options import ServeOptions
from weft.serve.command import server_command
from weft.serve.launch import takes

pytestmark = pytest.mark.serve
pytest_plugins = ["engines", "servers"]


def test_it_says_in_one_line_what_runs(server, saved):
    port, first = server
    base = json.loads((saved[0] / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert first.endswith(
        f"serves my-mixture, 2 experts (code, law) of {base}: a scaling pass, then the adapted pass; "
        f"http://127.0.0.1:{port}/v1\n"
    )


def test_clients_get_what_generate_writes(server, saved):
    port, _ = server
    assert [model["id"] for model in request(port, "/v1/models")["data"]] == [
        "my-mixture",
        "my-mixture:code",
        "my-mixture:law",
        "my-mixture:base",
    ]
    body = {"model": "my-mixture", "prompt": PROMPT, "max_tokens": NEW, "temperature": 0}
    answer = request(port, "/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})
    assert answer["choices"][0]["token_ids"] == generated(saved[1], [PROMPT])[0][0]


def test_the_key_is_asked_for(server):
    with pytest.raises(urllib.error.HTTPError, match="401"):
        request(server[0], "/v1/models", key="wrong")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("not installed", "weft is on the path here but not installed, so vLLM does not find its plugin"),
        ("left out", "VLLM_PLUGINS (other,more) leaves weft's plugin out: add weft to it, or unset it"),
        ("another vLLM", "is not supported, expected vLLM 0.32: cannot import name"),
    ],
)
def test_a_plugin_that_vllm_would_not_have_is_told_before_it_starts(broken, message, saved, monkeypatch, capsys):
    if broken == "not installed":
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    elif broken == "left out":
        monkeypatch.setenv("VLLM_PLUGINS", "other,more")
    else:
        monkeypatch.delitem(sys.modules, "weft.serve.front", raising=False)
        monkeypatch.delattr("vllm.entrypoints.serve.middleware.authenticate.GUARDED_PREFIX")
    assert main(["serve", str(saved[0])]) == 1
    assert message in capsys.readouterr().err


def test_a_misspelt_option_is_told_and_vllms_own_are_taken(saved, capsys):
    assert main(["serve", str(saved[0]), "--prot", "8001"]) == 1
    assert "--prot is no option: did you mean --port?" in capsys.readouterr().err
    assert all(map(takes, ("--seed", "--max-model-len", "--max_model_len", "--hf-overrides.a.b", "--max-mod")))
    assert not takes("--hosts")
    server_command(ServeOptions(str(saved[0])), ["--seed", "1"])


def test_a_base_that_vllm_does_not_know_is_refused(saved, tmp_path, capsys):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    assert main(["serve", str(saved[0]), "--base", str(tmp_path / "base")]) == 1
    assert "is of the classes ['T5Model'], none of which is among vLLM's text models" in capsys.readouterr().err

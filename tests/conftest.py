"""Tiny real models, made in memory, and LoRA adapters for them, saved as peft saves them."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import weft  # before peft, whose libraries it hushes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import huggingface_hub
import jaxtyping
import peft
import pytest
import torch
import transformers

from models import ARCHITECTURES, adapters_of, lora, save_adapter, tiny_llama, tiny_tokenizer
from traced import browser, chromium

torch.set_num_threads(1)

# Need vLLM, which has an environment of its own (make test-serve).
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["serve/vllm/*"]

HUB_TOKEN = "hf_right"  # of the stand-in for the Hub


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def chrome():
    """A Chromium. Not for the whole session: while one is open, nothing else can run an event loop."""
    path = chromium()
    if path is None:
        pytest.skip("no Chromium was found: `make browser` installs one, WEFT_CHROMIUM names one")
    with browser(path) as launched:
        yield launched


@pytest.fixture
def visit(chrome):
    """Opens the page of a scripted server (tests/support/visits.py)."""
    from visits import visiting

    with visiting(chrome) as open_page:
        yield open_page


@pytest.fixture
def expect():
    """playwright's assertions, which wait until they hold."""
    from playwright.sync_api import expect

    return expect


@pytest.fixture(scope="session")
def llama_adapters(tmp_path_factory):
    """Three adapters of the tiny Llama, with ranks, alphas and targets of their own: {name: folder}."""
    folder = tmp_path_factory.mktemp("llama-adapters")
    options = {
        "math": lora(r=4, target_modules=["q_proj", "v_proj", "up_proj"]),
        "code": lora(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj", "up_proj"]),
        "adapter_3": lora(r=6, use_rslora=True, target_modules=["q_proj", "down_proj", "up_proj"]),
    }
    return {
        name: save_adapter(tiny_llama(), config, folder / name, seed=seed)
        for seed, (name, config) in enumerate(options.items(), start=1)
    }


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A tiny Llama with a tokenizer, saved as a user has it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base_without_z(tmp_path):
    """A model in which the letter Z is not a number."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("Z")["input_ids"]] = torch.nan
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(scope="session")
def base_adapters(base_folder, tmp_path_factory):
    """Two adapters of the model in `base_folder`: {name: folder}."""
    folder = tmp_path_factory.mktemp("base-adapters")
    return {
        name: save_adapter(
            transformers.AutoModelForCausalLM.from_pretrained(base_folder), lora(), folder / name, seed=seed
        )
        for seed, name in enumerate(("math", "code"), start=1)
    }


@pytest.fixture
def mixture(base_folder, base_adapters, tmp_path):
    """The folder of a mixture of the adapters in `base_adapters`."""
    folder = tmp_path / "mixture"
    weft.from_adapters(str(base_folder), base_adapters).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request, tmp_path_factory):
    return adapters_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session", params=[name for name in ARCHITECTURES if name != "bert"])
def decoder(request, tmp_path_factory):
    return adapters_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def without_type_checks(monkeypatch):
    """Values of other types reach the options as they do for users, whose calls nobody checks against annotations."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def peft_xlora_restored():
    """Whatever a test registers with peft is undone."""
    yield peft
    weft.unregister_from_peft()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder whose subfolders user/name are the repositories of a Hub on this machine, which also takes commits."""
    repositories, commit = tmp_path / "hub", "0" * 39 + "1"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = self.path.partition("?")[0].strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            user, name, kind, _, *file = [*parts[2:], "", ""] if is_api else parts
            folder = repositories / user / name
            if not folder.is_dir():
                return self.answer(b"{}", status=404)
            if kind == "resolve":
                return self.answer(folder.joinpath(*file).read_bytes())
            files = [path for path in folder.rglob("*") if path.is_file()]
            listing = [
                {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
                for path in files
            ]
            return self.answer(json.dumps(listing if kind == "tree" else {"id": name, "sha": commit}).encode())

        do_HEAD = do_GET

        def do_POST(self):
            path, body = self.path.partition("?")[0].strip("/").split("/"), self.body()
            if self.headers.get("Authorization") != f"Bearer {HUB_TOKEN}":
                return self.answer(b"{}", status=401)
            if path == ["api", "validate-yaml"]:
                return self.answer(json.dumps({"errors": [], "warnings": []}).encode())
            if path == ["api", "repos", "create"]:
                wanted = json.loads(body)
                repository = f"{wanted['organization']}/{wanted['name']}"
                if wanted["organization"] != "user":
                    return self.answer(b"{}", status=403)
                (repositories / repository).mkdir(parents=True, exist_ok=True)
                (repositories / "user" / "visibility").write_text(json.dumps(wanted))
                return self.answer(json.dumps({"url": f"{url}/{repository}"}).encode())
            user, name, kind = path[2:5]
            if kind == "preupload":
                modes = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(json.dumps({"files": modes}).encode())
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    file = repositories / user / name / line["value"]["path"]
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(base64.b64decode(line["value"]["content"]))
            answer = {"success": True, "commitOid": commit, "commitUrl": f"{url}/{user}/{name}/commit/{commit}"}
            return self.answer(json.dumps(answer).encode())

        def body(self):
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def answer(self, data, status=200):
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", commit)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        url, constants = f"http://127.0.0.1:{server.server_port}", huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
        yield repositories
        server.shutdown()

"""Many clients at one server for minutes: no wrong token, no growth, no silence; and what a killed engine leaves.

PYTHONPATH=src:tests/support python -m soak --seconds 300 --clients 64
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import torch

import weft
from engines import llama, prompts, sharpen
from models import lora, save_adapter, tiny_tokenizer
from servers import started
from weft.serve.embedded.following import following
from weft.serve.requests import Served

SERVED = Served("mix", ("code", "law"))
ASKED = [
    ("mix", None),
    ("mix:code", None),
    ("mix:base", None),
    ("mix", {"weights": {"code": 0.7, "law": 0.3}}),
    ("mix", {"top_k": 1}),
    ("mix", {"global_weight": 0.5, "shares": True}),
]
MALFORMED = [
    b"{",
    b'{"model": "mix"}',
    b'{"model": "mix:lax", "prompt": "a"}',
    b'{"model": "mix", "prompt": "a", "weft": {"top_k": 9}}',
    b'{"model": "mix", "prompt": "a", "max_tokens": -3}',
    json.dumps({"model": "mix", "prompt": [7] * 5000}).encode(),
    json.dumps({"model": "mix", "prompt": "x" * 3_000_000}).encode(),
    b"[" * 200_000,
]


def main() -> None:
    """Run, print what was seen, and end with 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--clients", type=int, default=64)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, mixture = made(Path(folder))
        with started(mixture) as (port, _, process):
            soak = Soak(port)
            memory = asyncio.run(soak.run(arguments.clients, arguments.seconds, process.pid))
            wrong = soak.replay(model)
            silent = asyncio.run(killed(port, process))
    first, last = memory[len(memory) // 4], memory[-1]
    seen = {"answers": len(soak.answers), **soak.counts, "replayed wrong": wrong, "after the kill": silent}
    seen |= {"slowest /health, s": round(soak.slowest, 2), "MB at a quarter and at the end": [first, last]}
    print(json.dumps(seen, indent=1))
    faults = [wrong, soak.counts["not refused"], soak.counts["failed"], soak.counts["/health"], last > 1.05 * first]
    raise SystemExit(int(any(faults) or silent != ["an error", "ended"]))


def made(folder):
    """A mixture and its model."""
    llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    adapters = {name: save_adapter(llama(), lora(), folder / name, seed) for seed, name in enumerate(SERVED.experts, 1)}
    model = sharpen(weft.from_adapters(str(folder / "base"), adapters)).eval()
    model.save_pretrained(folder / "mix")
    return model, folder / "mix"


class Soak:
    """What clients did and saw."""

    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"
        self.headers = {"authorization": "Bearer secret", "content-type": "application/json"}
        self.answers = []
        self.counts = Counter()
        self.slowest = 0.0
        # Common beginnings, which caches share.
        self.texts = [prompts((64,))[0] + more for more in prompts(random.Random(0).choices(range(1, 90), k=40))]

    async def run(self, clients, seconds, pid):
        """Let all clients work, and look at the server's memory beside."""
        end = time.monotonic() + seconds
        # The server closes what has been idle for five seconds: a request must not cross that on its way.
        limits = httpx.Limits(max_connections=clients + 4, keepalive_expiry=2)
        async with httpx.AsyncClient(timeout=120, limits=limits, headers=self.headers) as http:
            work = [asyncio.create_task(self.client(http, number, end)) for number in range(clients)]
            memory = []
            while time.monotonic() < end:
                before = time.monotonic()
                answer = await http.get(f"{self.url}/health")
                self.slowest = max(self.slowest, time.monotonic() - before)
                self.counts["/health"] += answer.status_code != 200
                memory.append(resident(pid))
                await asyncio.sleep(2)
            await asyncio.gather(*work)
        return memory

    async def client(self, http, number, end):
        """One client: mostly right requests, sometimes hanging up, sometimes nonsense."""
        chance = random.Random(number)
        while time.monotonic() < end:
            kind = chance.random()
            if kind < 0.1:
                answer = await http.post(f"{self.url}/v1/completions", content=chance.choice(MALFORMED))
                self.counts["refused" if 400 <= answer.status_code < 500 else "not refused"] += 1
                continue
            text, asked, new = chance.choice(self.texts), chance.choice(ASKED), chance.randint(1, 40)
            body = {"model": asked[0], "prompt": text, "max_tokens": new, "temperature": 0, "ignore_eos": True}
            body |= {"return_token_ids": True, "stream": True} | ({"weft": asked[1]} if asked[1] else {})
            tokens = []
            try:
                async with http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            tokens += json.loads(line[6:])["choices"][0]["token_ids"]
                            if kind < 0.2 and len(tokens) > new / 2:
                                break
            except httpx.HTTPError as err:
                self.counts["failed"] += 1
                print(f"failed: {err!r}")
                continue
            if kind < 0.2:
                self.counts["hung up"] += 1
            elif len(tokens) != new:
                self.counts["failed"] += 1
                print(f"failed: {len(tokens)} of {new} tokens for {asked} after {len(text)}")
            else:
                self.answers.append((text, asked, tokens))

    def replay(self, model, most=300):
        """How many of a sample of the answers `generate` does not write."""
        wrong = 0
        for text, asked, tokens in random.Random(0).sample(self.answers, min(most, len(self.answers))):
            with following(model, SERVED.choice(*asked)), torch.no_grad():
                options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
                ids = torch.tensor([text])
                found = model.generate(input_ids=ids, max_new_tokens=len(tokens), **options)[0, len(text) :].tolist()
            wrong += found != tokens
        return wrong


async def killed(port, process):
    """What clients and the shell see when the engine is killed in the middle of answers."""
    headers = {"authorization": "Bearer secret"}
    body = {"model": "mix", "prompt": [5] * 20, "max_tokens": 200, "ignore_eos": True, "stream": True}
    seen = "nothing"
    async with httpx.AsyncClient(timeout=60, headers=headers) as http:
        try:
            async with http.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: {") and seen == "nothing":
                        seen = "a text"
                        for pid in children(process.pid):
                            os.kill(pid, signal.SIGKILL)
                    if '"error"' in line:
                        seen = "an error"
        except httpx.HTTPError:
            seen = "an error"
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        return [seen, "runs on"]
    return [seen, "ended"]


def children(pid):
    """The engine's processes below a server."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    names = {int(each): Path(f"/proc/{each}/cmdline").read_bytes() for each in found}
    return [each for each, name in names.items() if b"EngineCore" in name or b"spawn_main" in name]


def resident(pid):
    """MB of a process and those below it."""
    left, total = [pid], 0
    while left:
        each = left.pop()
        try:
            status = Path(f"/proc/{each}/status").read_text()
            left += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")), 0)
    return total // 1024


if __name__ == "__main__":
    main()

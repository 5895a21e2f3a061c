"""One engine of benchmarks/serve.py, in a process of its own: reads loads from stdin, writes tokens per second.

    python benchmarks/serve_engine.py '{"model": FOLDER, "mixture": FOLDER or null, "options": {...}}'

A load is {"requests": n, "prompt": tokens, "new": tokens}; an answer {"decode": tokens/s after everybody's first token,
"all": new tokens/s with prefill}.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
VOCABULARY = 49_000


def main() -> None:
    """Load the engine, and measure what is asked for until stdin ends."""
    asked = json.loads(sys.argv[1])
    measure = (Generate if asked.get("generate") else Vllm)(asked)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    print(json.dumps({"ready": resident_peak()}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(**json.loads(line))), file=answers, flush=True)


def resident_peak() -> float:
    """MB of resident memory at the peak so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def prompts(requests: int, prompt: int) -> list[list[int]]:
    """New ones at every call, so that nothing is found in a cache."""
    return [[random.randrange(100, VOCABULARY) for _ in range(prompt)] for _ in range(requests)]


class Vllm:
    """vLLM in this process.

    Args:
        asked: see above; `lora` is an adapter's folder, served by vLLM's own path.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        values = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32, "block_size": 32} | asked["options"]
        values["num_gpu_blocks_override"] = 256  # enough for the largest load, and eight engines fit in memory
        if asked.get("mixture"):
            architecture = json.loads(Path(asked["model"], "config.json").read_text())["architectures"][0]
            values["hf_overrides"] = {"architectures": [f"Weft{architecture}"]}
            values["additional_config"] = {"weft": asked["mixture"]}
            values["logits_processors"] = ["weft.serve.choices:RequestRows"]
        if asked.get("lora"):
            values |= {"enable_lora": True, "max_lora_rank": 16}
        self.lora = LoRARequest("one", 1, asked["lora"]) if asked.get("lora") else None
        self.llm = LLM(model=asked["model"], distributed_executor_backend="uni", **values)
        self.number = 0

    def __call__(self, requests: int, prompt: int, new: int) -> dict[str, Any]:
        """Run requests that come at once."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        start = time.perf_counter()
        for tokens in prompts(requests, prompt):
            self.number += 1
            engine.add_request(str(self.number), {"prompt_token_ids": tokens}, parameters, lora_request=self.lora)
        first: dict[str, float] = {}
        counted = 0
        began = start
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            everybody = len(first) == requests
            for output in outputs:
                first.setdefault(output.request_id, now)
            if not everybody and len(first) == requests:
                began = now
            elif everybody:
                counted += len(outputs)
        end = time.perf_counter()
        return {"decode": counted / (end - began), "all": requests * new / (end - start)}


class Generate:
    """weft's own `generate`, or the base model's."""

    def __init__(self, asked: dict[str, Any]) -> None:
        import torch
        import transformers

        import weft

        torch.set_num_threads(2)
        self.model: Any = (
            weft.from_pretrained(asked["mixture"], asked["model"])
            if asked.get("mixture")
            else transformers.AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.float32)
        ).eval()

    def __call__(self, requests: int, prompt: int, new: int) -> dict[str, Any]:
        """Run requests that come at once."""
        import torch

        ids = torch.tensor(prompts(requests, prompt))
        options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
        mask = torch.ones_like(ids)
        times = []
        for length in (1, new):
            options |= {"min_new_tokens": length, "max_new_tokens": length}
            start = time.perf_counter()
            self.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)
            times.append(time.perf_counter() - start)
        return {"decode": requests * (new - 1) / (times[1] - times[0]), "all": requests * new / times[1]}


if __name__ == "__main__":
    main()

"""vLLM in this process, on the CPU, with tiny models: run by `make test-serve`, in an environment that has vLLM."""

import contextlib
import gc
import json
import os
from pathlib import Path

import pytest
import torch

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_LOGGING_LEVEL": "CRITICAL",
}
NEW = 12  # tokens


def sharpen(model):
    """Give a gate weights so large that experts matter and tokens differ."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "internal_xlora_classifier" in name:
                parameter.copy_(torch.randn_like(parameter) * (1.0 if "weight" in name else 0.5))
    return model


@torch.no_grad()
def generated(model, prompts):
    """Of each prompt, the greedy tokens by `generate`, and their log-probabilities by one forward without a cache."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        log_probs = torch.log_softmax(model(input_ids=text, use_cache=False).logits[0].double(), -1)
        tokens = text[0, len(prompt) :].tolist()
        found.append((tokens, [float(log_probs[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens)]))
    return found


@contextlib.contextmanager
def engine(base, mixture=None, **options):
    """vLLM on a base model, with a mixture in it."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    values = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "block_size": 32,
        "distributed_executor_backend": "uni",
    }
    if mixture is not None:
        architecture = json.loads(Path(base, "config.json").read_text())["architectures"][0]
        values |= {
            "hf_overrides": {"architectures": [f"Weft{architecture}"]},
            "additional_config": {"weft": str(mixture)},
        }
    made = LLM(model=str(base), **{**values, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm, prompts, **options):
    """The same as `generated`, of vLLM, all prompts in one batch."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=1, **options)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    found = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        log_probs = [of[token].logprob for of, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        found.append((tokens, log_probs))
    return found


def assert_same(found, expected):
    """The same tokens, with the same log-probabilities within 1e-3."""
    for (tokens, log_probs), (right, right_log_probs) in zip(found, expected, strict=True):
        assert tokens == right
        assert log_probs == pytest.approx(right_log_probs, abs=1e-3)

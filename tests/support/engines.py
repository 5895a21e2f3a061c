"""vLLM in this process, on the CPU, with tiny models: run by `make test-serve`, in an environment that has vLLM."""

import contextlib
import gc
import json
import os
from pathlib import Path

import pytest
import torch

import weft
from models import lora, save_adapter, tiny_llama, tiny_tokenizer
from weft.serve.embedded.following import following
from weft.serve.requests import Choice, cache_salt

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_LOGGING_LEVEL": "CRITICAL",
}
NEW = 12  # tokens
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = (5, 17, 40, 3)


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]


def llama():
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 512}
    return tiny_llama(vocab_size=len(tiny_tokenizer()), **sizes)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapters(tmp_path_factory):
    """Experts of unlike ranks, alphas, targets and kinds."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "code": lora(target_modules=PROJECTIONS),
        "law": lora(r=6, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]),
        "math": lora(
            lora_alpha=4,
            target_modules=PROJECTIONS,
            rank_pattern={"q_proj": 2},
            alpha_pattern={"v_proj": 16},
            lora_bias=True,
        ),
    }
    return {
        name: save_adapter(llama(), config, folder / name, seed)
        for seed, (name, config) in enumerate(configs.items(), 1)
    }


@pytest.fixture
def make_mixture(adapters, tmp_path):
    """Make and save one with these options; (folder, model)."""

    def make(**options):
        model = sharpen(weft.from_adapters(llama(), adapters, **options)).eval()
        model.save_pretrained(tmp_path / "mixture")
        return tmp_path / "mixture", model

    return make


@pytest.fixture
def preempted(monkeypatch):
    """The requests that vLLM put off for want of cache in this test."""
    from vllm.v1.core.sched.scheduler import Scheduler

    put_off, found = Scheduler._preempt_request, []

    def noted(self, request, *arguments, **options):
        found.append(request.request_id)
        return put_off(self, request, *arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    return found


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


def chosen(model, folder, choice, prompt):
    """What `generate` gives with a choice; of an expert alone, what it gives with no other loaded."""
    if choice.alone:
        model = weft.from_adapters(llama(), {choice.alone: folder / "experts" / choice.alone}).eval()
    with following(model, choice):
        return generated(model, [prompt])[0]


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
            "logits_processors": ["weft.serve.choices:RequestRows"],
            "worker_extension_cls": "weft.serve.choices.WorkerExtension",
        }
    made = LLM(model=str(base), **{**values, **options})
    try:
        yield made
    finally:
        made.llm_engine.engine_core.shutdown()
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def served(llm, prompts, choices=None, **options):
    """The same as `generated`, of vLLM, all prompts in one batch, each with a choice of its own if there are any."""
    from vllm import SamplingParams

    choices = choices or [Choice() for _ in prompts]
    options = {"temperature": 0, "max_tokens": NEW, "ignore_eos": True, "logprobs": 1, **options}
    parameters = [SamplingParams(extra_args={"weft": each.written()}, **options) for each in choices]
    texts = [
        {"prompt_token_ids": prompt, "cache_salt": cache_salt(each, "test")}
        for prompt, each in zip(prompts, choices, strict=True)
    ]
    outputs = llm.generate(texts, parameters, use_tqdm=False)
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


@torch.no_grad()
def log_probs(model, texts):
    """Of each token but the first."""
    found = []
    for text in texts:
        logits = model(input_ids=torch.tensor([text])).logits[0, :-1].double()
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(text[1:])[:, None])[:, 0])
    return torch.cat(found)


def served_log_probs(llm, texts):
    """The same, in vLLM."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], parameters, use_tqdm=False)
    found = [
        of[token].logprob
        for output, text in zip(outputs, texts, strict=True)
        for of, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)
    ]
    return torch.tensor(found, dtype=torch.float64)

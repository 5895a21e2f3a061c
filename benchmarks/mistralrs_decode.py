"""Decode speed of mistral.rs, a Rust engine that also serves X-LoRA: plain and with four experts.

SmolLM2-135M in float32 with `decode.py`'s adapters and gate, from a prompt of one token: version 0.9.5's X-LoRA fails
on longer ones, so only decoding can be compared. The engine gets an environment of its own, `.bench/mistralrs/venv`,
and local folders in its formats; this script runs itself there, once per model. The last line of the output is JSON:
`{"error": ...}` where the engine cannot be installed or run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# What the engine's environment lacks (torch, weft, contenders) is imported inside functions.

VERSION = "0.9.5"
FOLDER = Path(__file__).parent.parent / ".bench" / "mistralrs"
PYTHON = FOLDER / "venv" / "bin" / "python"
BASE, XLORA = FOLDER / "base", FOLDER / "xlora"
EXPERTS = 4  # the engine finds an adapter's files by substring: from ten on, the names would need leading zeros
ROUNDS = 3
LIMIT = 1800  # seconds: a request waits forever when the engine's thread has died


def main() -> None:
    """Measure both models, or, in the engine's environment, one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--engine", choices=["plain", "xlora"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(tokens_per_second(arguments.engine, arguments.new_tokens)))
        return
    try:
        install()
        prepare()
        (plain, plain_threads), (xlora, xlora_threads) = (
            best(kind, arguments.new_tokens) for kind in ("plain", "xlora")
        )
    except (OSError, subprocess.SubprocessError) as error:
        print(json.dumps({"error": described(error)}))
        return
    result = {
        "version": VERSION,
        "plain_tokens_per_s": plain,
        "xlora_tokens_per_s": xlora,
        "context": f"{shorter(arguments.new_tokens) + 1}-{arguments.new_tokens}",
        "threads": {"plain": plain_threads, "xlora": xlora_threads},
    }
    print(json.dumps(result))


def install() -> None:
    """Make the engine's environment; both commands only complete one that exists."""
    run([sys.executable, "-m", "venv", str(FOLDER / "venv")])
    run([str(PYTHON), "-m", "pip", "install", "--quiet", f"mistralrs=={VERSION}"])


def prepare() -> None:
    """Write the base model and the X-LoRA model in the engine's formats, anew every time: it takes seconds."""
    from contenders import ROOT, load_base, quiet, save_adapters, weft_model

    quiet()
    base = load_base()
    for folder in (BASE, XLORA):
        shutil.rmtree(folder, ignore_errors=True)
    write_base(ROOT / ".demo" / "model")
    with tempfile.TemporaryDirectory() as temporary:
        adapters = save_adapters(base, EXPERTS, Path(temporary))
        write_xlora(base, weft_model(base, adapters), list(adapters.values()))


def write_base(source: Path) -> None:
    """Copy the model; the engine's X-LoRA Llama knows neither a tied head nor `rope_parameters`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, BASE, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config |= {"tie_word_embeddings": False, "rope_theta": config["rope_parameters"]["rope_theta"]}
    write_json(BASE / "config.json", config)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, BASE / "model.safetensors", metadata={"format": "pt"})


def write_xlora(base: Any, model: Any, adapters: list[str]) -> None:
    """Write weft's gate and the adapters into one flat folder: the engine does not look into subfolders."""
    from safetensors.torch import save_file

    from contenders import PROJECTIONS

    XLORA.mkdir(parents=True)
    names = [f"adapter_{number}" for number in range(1, len(adapters) + 1)]
    for name, adapter in zip(names, adapters, strict=True):
        shutil.copy(Path(adapter) / "adapter_model.safetensors", XLORA / f"{name}_model.safetensors")
        shutil.copy(Path(adapter) / "adapter_config.json", XLORA / f"{name}_config.json")
    gate = model.internal_xlora_classifier.state_dict()
    classifier = {f"last.{part}": gate[f"layers.0.{part}"].contiguous() for part in ("weight", "bias")}
    save_file(classifier, XLORA / "xlora_classifier.safetensors")
    identity = {"base_model_id": str(BASE)}  # must be the same string everywhere, `model_id` included
    modules = [name for name, _ in base.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    layers = {name: number for number, name in enumerate(modules)}
    write_json(XLORA / "ordering.json", {"order": names, "layers": layers, **identity})
    config = {
        "hidden_size": model.config.hidden_size,
        "adapters": {name: name for name in names},
        "device": "cpu",
        "layerwise_scalings": True,
        "xlora_depth": 1,
        "xlora_size": 2048,
        "xlora_dropout_p": 0.2,
        "enable_softmax": True,
        "enable_softmax_topk": False,
        "softmax_temperature": 1.0,
        "top_k_lora": None,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": 1.0,
        "use_trainable_adapters": False,
    }
    write_json(XLORA / "xlora_config.json", config | identity)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def best(kind: str, new_tokens: int) -> tuple[float, int]:
    """Tokens per second and threads: torch's number or one, whichever is faster.

    Beside another busy process, two threads on two cores were four to five times slower than one (version 0.9.5).
    """
    import torch

    return max((in_engine(kind, new_tokens, threads), threads) for threads in {1, torch.get_num_threads()})


def in_engine(kind: str, new_tokens: int, threads: int) -> float:
    """Run this script in the engine's environment."""
    variables = {
        "RAYON_NUM_THREADS": str(threads),
        "CANDLE_NUM_THREADS": str(threads),
        "MISTRALRS_CPU_KV_F32": "1",  # else the plain model's cache is float16
        "HF_HUB_OFFLINE": "1",
    }
    command = [str(PYTHON), __file__, "--engine", kind, "--new-tokens", str(new_tokens)]
    return json.loads(run(command, **variables).strip().splitlines()[-1])


def run(command: list[str], **variables: str) -> str:
    """The output of a process that must succeed."""
    environment = os.environ | variables
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=LIMIT).stdout


def described(error: Exception) -> str:
    """What went wrong, with the end of what the process said."""
    said = getattr(error, "stderr", None) or ""
    return f"{error}: {said[-500:]}"


def shorter(new_tokens: int) -> int:
    """The length of the request that is subtracted."""
    return new_tokens * 2 // 3


def tokens_per_second(kind: str, new_tokens: int) -> float:
    """Decode speed by the difference of two requests, which cancels loading, prompt and early tokens; median."""
    runner = load(kind)
    seconds_of(runner, 8)  # warms up
    short = shorter(new_tokens)
    rounds = [seconds_of(runner, new_tokens) - seconds_of(runner, short) for _ in range(ROUNDS)]
    return (new_tokens - short) / statistics.median(rounds)


def load(kind: str) -> Any:
    """The engine with one of the models; without prefix cache, for all requests have the same prompt."""
    from mistralrs import Architecture, ModelDType, Runner, Which

    options = {"model_id": str(BASE), "arch": Architecture.Llama, "dtype": ModelDType.F32}
    if kind == "plain":
        which = Which.Plain(**options)
    else:
        which = Which.XLora(xlora_model_id=str(XLORA), order=str(XLORA / "ordering.json"), **options)
    return Runner(which, max_seqs=1, prefix_cache_n=0, token_source="none")


def seconds_of(runner: Any, new_tokens: int) -> float:
    """Seconds of one greedy request from a prompt of one token."""
    from mistralrs import CompletionRequest

    request = CompletionRequest(
        prompt="Once", model="default", max_tokens=new_tokens, temperature=0.0, top_k=1, ignore_eos=True
    )
    start = time.perf_counter()
    usage = runner.send_completion_request(request).usage
    elapsed = time.perf_counter() - start
    if (usage.prompt_tokens, usage.completion_tokens) != (1, new_tokens):
        raise RuntimeError(f"read {usage.prompt_tokens} and wrote {usage.completion_tokens} tokens, not {new_tokens}")
    return elapsed


if __name__ == "__main__":
    main()

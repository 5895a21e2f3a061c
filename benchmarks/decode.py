"""Decoding: tokens per second and cache memory against the base, one LoRA, peft's X-LoRA and mistral.rs.

SmolLM2-135M in float32, random adapters of rank 16 on all seven projections, 128 tokens of prompt and 128 new ones, in
one process. The contenders take turns, some tokens each, so that drift of the machine hits all alike; medians over all
steps. About half an hour on two quiet cores, of which the measurements take ten minutes, compiling the rest. Writes
`results/DATE-decode.{json,md}`, or `DATE-decode-eager` without compiling.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
from transformers import DynamicCache, StaticCache

import weft
from contenders import (
    RANK,
    ROOT,
    load_base,
    one_lora,
    peft_model,
    quiet,
    save_adapters,
    sharing_weights,
    weft_model,
)
from harness import save, setting

PROMPT = 128
COMPILED = ("base", "weft 4", "weft 4, scaling_pass_layers=4", "weft 4, gate_layer=4")
TURN = 16  # tokens that a contender decodes before the next one's turn


def main() -> None:
    """Run all parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--without-mistralrs", action="store_true")
    parser.add_argument("--without-compile", action="store_true")
    arguments = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    base = load_base()
    result: dict[str, Any] = {"setting": setting()}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        models = contenders(base, save_adapters(base, 16, Path(folder)))
        steps = {} if arguments.without_compile else compiled({name: models[name] for name in COMPILED})
        print("measuring", file=sys.stderr, flush=True)
        result["read_gb_per_s"] = memory_bandwidth()
        result["batch 1"] = decode(models, 1, arguments.new_tokens)
        result["batch 8"] = decode(models, 8, arguments.new_tokens)
        result["kilobytes per token"] = {name: cache_bytes(model) / 1000 for name, model in models.items()}
        result["peft X-LoRA 4, uncached"] = uncached(peft_model(base, save_adapters(base, 4, Path(folder))))
        if steps:
            seconds = in_turns(steps, 3)
            result["compiled"] = {
                name: {"tokens_per_s": 1 / value, "gb_read_per_s": weights_read(models[name]) / 1e9 / value}
                for name, value in seconds.items()
            }
    if not arguments.without_mistralrs:
        result["mistral.rs"] = mistralrs()
    save("decode-eager" if arguments.without_compile else "decode", result, table(result))


def contenders(base: Any, adapters: dict[str, str]) -> dict[str, Any]:
    """Name -> model; all share the base's weights."""
    four, sixteen = dict(list(adapters.items())[:4]), adapters
    models = {"base": base, "one LoRA": one_lora(base, RANK), "weft 4": weft_model(base, four)}
    models["weft 16"] = weft_model(base, sixteen)
    for name, chosen, options in (
        ("weft 16, top_k_lora=2", sixteen, {"top_k_lora": 2}),
        ("weft 4, scaling_pass_layers=4", four, {"scaling_pass_layers": 4}),
        ("weft 4, gate_layer=4", four, {"gate_layer": 4}),
    ):
        models[name] = weft.from_adapters(sharing_weights(base), chosen, layerwise_scalings=True, **options).eval()
    return models


def decode(models: dict[str, Any], batch: int, new_tokens: int) -> dict[str, float]:
    """Tokens per second of each, all sequences together."""
    ids = torch.randint(0, 40_000, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    steps = {name: stepper(model, ids, DynamicCache(config=model.config)) for name, model in models.items()}
    steps["weft 4, frozen"] = stepper(models["weft 4"], ids, DynamicCache(config=models["base"].config), frozen=True)
    return {name: batch / seconds for name, seconds in in_turns(steps, max(1, new_tokens // TURN)).items()}


def in_turns(steps: dict[str, Callable[[], None]], turns: int) -> dict[str, float]:
    """Median seconds of a step of each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            step()  # brings the weights back into the caches of the processor, as in a run of its own
            for _ in range(TURN):
                start = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def stepper(model: Any, ids: torch.Tensor, cache: Any, *, frozen: bool = False, call: Any = None) -> Callable[[], None]:
    """Reads the prompt; each call decodes one token, greedily."""
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    if frozen:
        with model.base_model.passes.freeze_scalings_at(PROMPT):
            output = model(input_ids=ids, **options)
    else:
        output = model(input_ids=ids, **options)
    token, position = output.logits[:, -1:].argmax(-1), ids.shape[1]
    run = model if call is None else call

    def step() -> None:
        nonlocal token, position
        positions = torch.full((len(ids), 1), position)
        token = run(input_ids=token, position_ids=positions, **options).logits[:, -1:].argmax(-1)
        position += 1

    return step


def cache_bytes(model: Any) -> float:
    """Bytes of keys and values per token, those of a scaling pass included."""
    cache = model(input_ids=torch.ones(1, PROMPT, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values
    caches = [cache, *([cache.scaling] if hasattr(cache, "scaling") else [])]
    return sum(layer.keys.nbytes + layer.values.nbytes for one in caches for layer in one.layers) / PROMPT


def uncached(model: Any, steps: int = 5) -> float:
    """Tokens per second of peft's X-LoRA, which reads the whole text for each, at a length of 160."""
    ids = torch.ones(1, 160, dtype=torch.long)
    model(input_ids=ids)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=ids)
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)


def compiled(models: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """The same steps with torch.compile and a static cache, compiled."""
    # Weights become constants of the graph, and products are torch's own kernels where those are faster than MKL's.
    inductor.freezing = inductor.max_autotune = True
    inductor.max_autotune_gemm_backends = "CPP,ATEN"
    ids = torch.randint(0, 40_000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    steps = {}
    for name, model in models.items():
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        cache = StaticCache(config=model.config, max_cache_len=2 * PROMPT)
        # A function around the base model's call, so that its hooks, which are the passes, are in the graph.
        step = torch.compile(functools.partial(_call, inner), fullgraph=True, dynamic=False)
        steps[name] = stepper(model, ids, cache, call=step)
        start = time.perf_counter()
        steps[name]()
        print(f"compiled {name} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return steps


def _call(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


def weights_read(model: Any) -> float:
    """Bytes of weights that one token of one text must read, all passes together."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    if not hasattr(model, "passes"):
        return total
    config, backbone = model.passes.config, model.backbone
    own = [parameter for name, parameter in backbone.module.named_parameters() if "lora_" not in name]
    if config.gate_layer is not None:
        return total
    if config.scaling_pass_layers is None:  # all but the embedding, of which a pass looks up one row
        return total + sum(p.nbytes for p in own) - model.get_input_embeddings().weight.nbytes
    layers = backbone.decoder_layers()[: config.scaling_pass_layers]
    return total + sum(p.nbytes for name, p in layers.named_parameters() if "lora_" not in name)


def memory_bandwidth() -> float:
    """GB per second that a sum over a large tensor reads: the ceiling of decoding."""
    values = torch.ones(150_000_000)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / 1e9 / statistics.median(seconds)


def mistralrs() -> dict[str, Any]:
    """What mistral.rs makes of the same sizes, in an environment of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "mistralrs_decode.py"), "--new-tokens", "192"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return json.loads(lines[-1]) if lines else {"error": done.stderr[-500:]}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "Tokens per second, 128 + 128 tokens, eager, dynamic cache; in brackets the share of the base's.",
        "",
        "| | batch 1 | batch 8 | kB of cache per token |",
        "| --- | --- | --- | --- |",
    ]
    for name, speed in result["batch 1"].items():
        eight = result["batch 8"][name]
        shares = [speed / result["batch 1"]["base"], eight / result["batch 8"]["base"]]
        memory = result["kilobytes per token"].get(name)
        lines.append(
            f"| {name} | {speed:.1f} ({shares[0]:.2f}) | {eight:.1f} ({shares[1]:.2f}) | "
            + ("" if memory is None else f"{memory:.0f}")
            + " |"
        )
    lines += ["", f"peft's X-LoRA, 4 experts, uncached at length 160: {result['peft X-LoRA 4, uncached']:.2f} tokens/s"]
    if "compiled" in result:
        lines += [
            "",
            "torch.compile (inductor, max_autotune, freezing) and a static cache, batch 1; a sum reads memory at "
            f"{result['read_gb_per_s']:.1f} GB/s:",
            "",
            "| | tokens/s | GB/s of weights | share of the limit |",
            "| --- | --- | --- | --- |",
        ]
        for name, values in result["compiled"].items():
            share = values["gb_read_per_s"] / result["read_gb_per_s"]
            lines.append(f"| {name} | {values['tokens_per_s']:.1f} | {values['gb_read_per_s']:.1f} | {share:.2f} |")
    if "mistral.rs" in result:
        lines += ["", f"mistral.rs: {json.dumps(result['mistral.rs'])}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

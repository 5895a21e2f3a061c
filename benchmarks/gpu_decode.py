"""Decoding on a GPU: a random Llama of about a billion parameters in bfloat16, static cache, CUDA graphs.

Tokens per second of the base, one LoRA, and weft with two passes, a short one and none, eager and compiled
(`mode="reduce-overhead"`), batch 1 and 8. Nothing is downloaded. A few minutes on one GPU; `--tiny --device cpu` tries
the script anywhere. Writes `results/DATE-gpu-decode.{json,md}`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import StaticCache

import weft
from contenders import PROJECTIONS, RANK, quiet, sharing_weights
from harness import save, setting

PROMPT, NEW = 128, 64
SCHEMES: dict[str, dict[str, Any]] = {
    "weft 4": {},
    "weft 4, scaling_pass_layers=4": {"scaling_pass_layers": 4},
    "weft 4, gate_layer=4": {"gate_layer": 4},
}


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model and few tokens, nothing is written")
    arguments = parser.parse_args()
    quiet()
    base = make_base(arguments.tiny).to(arguments.device)
    speeds: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, model in contenders(base, Path(folder)).items():
            for batch in (1, 8):
                for compiled in (False, True):
                    label = f"batch {batch}, {'compiled' if compiled else 'eager'}"
                    speed = decode(model, batch, NEW if not arguments.tiny else 4, compiled=compiled)
                    speeds.setdefault(name, {})[label] = speed
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    result = {"setting": {**setting(), "device": where}, "tokens_per_s": speeds}
    if arguments.tiny:
        print(table(speeds))
    else:
        save("gpu-decode", result, table(speeds))


def make_base(tiny: bool) -> Any:
    """A random Llama in bfloat16."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32_000, num_key_value_heads=4, **sizes)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


def contenders(base: Any, folder: Path) -> dict[str, Any]:
    """Name -> model over the same base weights."""
    config = peft.LoraConfig(r=RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    one = peft.get_peft_model(sharing_weights(base), config, autocast_adapter_dtype=False).eval()
    one.save_pretrained(str(folder))
    adapters = {name: str(folder) for name in ("a", "b", "c", "d")}
    models = {"base": base, "one LoRA": one}
    for name, options in SCHEMES.items():
        mixture = weft.from_adapters(sharing_weights(base), adapters, layerwise_scalings=True, **options).eval()
        # Experts in the base's dtype, as a user has them who decodes in bfloat16; the gate stays in float32.
        for parameter_name, parameter in mixture.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = parameter.data.to(torch.bfloat16)
        models[name] = mixture
    return models


def decode(model: Any, batch: int, new_tokens: int, *, compiled: bool) -> float:
    """Tokens per second, all sequences together."""
    torch._dynamo.reset()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    device = inner.device
    ids = torch.randint(0, 32_000, (batch, PROMPT), device=device)
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + new_tokens + 8)
    options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    token = model(input_ids=ids, **options).logits[:, -1:].argmax(-1)
    # A function around the base model's call, so that its hooks, which are the passes, are in the graph.
    step = torch.compile(functools.partial(_call, inner), mode="reduce-overhead", fullgraph=True) if compiled else inner
    position = torch.full((batch, 1), PROMPT, device=device)
    seconds = []
    for number in range(new_tokens + 3):
        _wait(device)
        start = time.perf_counter()
        token = step(input_ids=token, position_ids=position, **options).logits[:, -1:].argmax(-1).clone()
        position += 1
        _wait(device)
        if number >= 3:  # compiling, and recording the graph
            seconds.append(time.perf_counter() - start)
    return batch / statistics.median(seconds)


def _call(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(speeds: dict[str, dict[str, float]]) -> str:
    """Markdown, with the share of the base's speed."""
    labels = list(speeds["base"])
    lines = [
        "Tokens per second, bfloat16, static cache; in brackets the share of the base's.",
        "",
        f"| | {' | '.join(labels)} |",
        "| --- |" + " --- |" * len(labels),
    ]
    for name, values in speeds.items():
        cells = [f"{values[label]:.0f} ({values[label] / speeds['base'][label]:.2f})" for label in labels]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""Training steps: the schemes and peft's X-LoRA against the training of ONE plain LoRA, in time and memory.

SmolLM2-135M in float32, one sequence of 512 tokens, random adapters of rank 16 on all seven projections, in one process
and interleaved, medians. The one LoRA trains its own weights, the others their gate. With gradient checkpointing peft's
X-LoRA computes no gradient of its gate (reentrant) or fails (not reentrant); it is timed all the same, reentrant.
"cached" is weft with its scaling pass from the disk, as from the second epoch on; reading it is part of the step.
About twenty minutes on two quiet cores. Writes `results/DATE-training.{json,md}`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

import weft
from contenders import RANK, load_base, one_lora, peft_model, quiet, same_gate, save_adapters, sharing_weights
from harness import interleaved, peak_memory, save, setting
from speed import Step, some

TOKENS = 512
LORA = "one LoRA"
CACHED = ", cached"
SCHEMES: dict[str, dict[str, Any]] = {
    "": {},
    ", scaling_pass_layers=4": {"scaling_pass_layers": 4},
    ", gate_layer=4": {"gate_layer": 4},
}


def main() -> None:
    """Measure with and without gradient checkpointing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    quiet()
    torch.manual_seed(0)
    base = load_base()
    result: dict[str, Any] = {"setting": setting()}
    with tempfile.TemporaryDirectory() as folder:
        adapters = save_adapters(base, 16, Path(folder))
        for checkpointing in (False, True):
            steps = contenders(base, adapters, Path(folder), checkpointing=checkpointing)
            for step in steps.values():
                step()
            memory = {name: peak_memory(step) for name, step in steps.items()}
            seconds = interleaved(steps, arguments.rounds)
            result["checkpointing" if checkpointing else "plain"] = {"seconds": seconds, "memory_mb": memory}
    save("training", result, table(result))


class CachedStep(Step):
    """One training step that reads its scaling pass from the disk."""

    def __init__(self, model: Any, ids: torch.Tensor, folder: Path) -> None:
        super().__init__(model, ids)
        cache = weft.ScalingCache.build(model, ids.tolist(), folder, announce=lambda line: None)
        self.collator = weft.ScalingCacheCollator(cache, lambda rows: {"input_ids": rows[0], "labels": rows[0]})

    def __call__(self) -> float:
        """Forward and backward; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(**self.collator([self.ids]), use_cache=False).loss
        loss.backward()
        return float(loss)


def contenders(base: Any, adapters: dict[str, str], folder: Path, *, checkpointing: bool) -> dict[str, Step]:
    """Name -> a step of training."""
    models = {LORA: one_lora(base, RANK)}
    for name, parameter in models[LORA].named_parameters():
        parameter.requires_grad_("lora_" in name)
    for number in (4, 16):
        chosen = some(adapters, number)
        for scheme, options in SCHEMES.items():
            own = sharing_weights(base)
            models[f"weft {number}{scheme}"] = weft.from_adapters(own, chosen, layerwise_scalings=True, **options)
        models[f"peft {number}"] = peft_model(base, chosen)
        same_gate(models[f"weft {number}"], models[f"peft {number}"])
    if checkpointing:
        for model in models.values():
            model.enable_input_require_grads()
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS))
    steps = {name: Step(model.train(), ids) for name, model in models.items()}
    steps |= {f"weft {n}{CACHED}": CachedStep(models[f"weft {n}"], ids, folder / "cache") for n in (4, 16)}
    return steps


def table(result: dict[str, Any]) -> str:
    """Markdown, with the share of the one LoRA's time, and of peft's where there is one with as many experts."""
    lines = [f"A training step of 1 x {TOKENS} tokens.", ""]
    for part, title in (("plain", "Without gradient checkpointing"), ("checkpointing", "With gradient checkpointing")):
        seconds, memory = result[part]["seconds"], result[part]["memory_mb"]
        lines += [f"## {title}", "", "| | seconds | x one LoRA | x peft | MB | x peft |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for name in seconds:
            peft_name = name.replace("weft", "peft").partition(",")[0]
            shares = [
                f"{values[name] / values[peft_name]:.2f}" if peft_name in values and peft_name != name else ""
                for values in (seconds, memory)
            ]
            of_lora = seconds[name] / seconds[LORA]
            lines.append(
                f"| {name} | {seconds[name]:.2f} | {of_lora:.2f} | {shares[0]} | {memory[name]:.0f} | {shares[1]} |"
            )
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

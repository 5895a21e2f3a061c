"""Speed and memory of forward and training, against peft's X-LoRA (the opponent), one LoRA and the base (the ceilings).

SmolLM2-135M in float32, random adapters of rank 16 on all seven projections, everything in one process and interleaved,
medians. `make bench` runs it; about ten minutes on two quiet cores. Writes `results/DATE-speed.{json,md}` and a plot.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from contenders import (
    RANK,
    load_base,
    one_lora,
    peft_model,
    quiet,
    same_gate,
    save_adapters,
    sharing_weights,
    weft_model,
)
from harness import RESULTS, interleaved, peak_memory, save, seconds_of, setting

GROWTH = (2, 4, 8, 16, 32)
TOKENS = 256


def main() -> None:
    """Run all parts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of each comparison")
    rounds = parser.parse_args().rounds
    quiet()
    torch.manual_seed(0)
    base = load_base()
    result: dict[str, Any] = {"setting": setting()}
    with tempfile.TemporaryDirectory() as folder:
        adapters = save_adapters(base, max(GROWTH), Path(folder))
        parts = {"forward": forward, "growth": growth, "training": training, "scaling_pass": scaling_pass}
        for name in track(parts, description="measuring"):
            result[name] = parts[name](base, adapters, rounds)
    result["start"] = start_up()
    plot(result)
    save("speed", result, table(result))


def some(adapters: dict[str, str], number: int) -> dict[str, str]:
    """The first adapters."""
    return dict(list(adapters.items())[:number])


@torch.no_grad()
def forward(base: Any, adapters: dict[str, str], rounds: int) -> dict[str, Any]:
    """Seconds of a forward of 256 tokens, and how far weft's logits are from peft's, in shares of the largest one."""
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS))
    models = {"base": base, "one LoRA": one_lora(base, RANK)}
    error = {}
    for number in (4, 16):
        ours, theirs = weft_model(base, some(adapters, number)), peft_model(base, some(adapters, number))
        same_gate(ours, theirs)
        models |= {f"weft {number}": ours, f"peft {number}": theirs}
        expected = theirs(input_ids=ids).logits
        error[number] = float((ours(input_ids=ids).logits - expected).abs().max() / expected.abs().max())
    seconds = interleaved({name: _forward(model, ids) for name, model in models.items()}, rounds)
    return {"seconds": seconds, "relative_difference_to_peft": error}


def _forward(model: Any, ids: torch.Tensor) -> Any:
    # The base and the single LoRA keep no cache either: all contenders do the same work.
    return lambda: model(input_ids=ids, use_cache=False)


@torch.no_grad()
def growth(base: Any, adapters: dict[str, str], rounds: int) -> dict[str, Any]:
    """Seconds of weft's forward for more and more experts, beside the arithmetic of the same ranks.

    The line to follow: a scaling pass (the backbone alone) and one plain LoRA that has all the ranks together.
    """
    ids = torch.randint(0, base.config.vocab_size, (1, TOKENS))
    contenders = {"backbone": lambda: base.model(input_ids=ids, use_cache=False)}
    for number in GROWTH:
        contenders[f"weft {number}"] = _forward(weft_model(base, some(adapters, number)), ids)
        contenders[f"rank {RANK * number}"] = _forward(one_lora(base, RANK * number), ids)
    seconds = interleaved(contenders, rounds)
    return {
        "experts": GROWTH,
        "weft": [seconds[f"weft {number}"] for number in GROWTH],
        "line": [seconds["backbone"] + seconds[f"rank {RANK * number}"] for number in GROWTH],
    }


def training(base: Any, adapters: dict[str, str], rounds: int) -> dict[str, Any]:
    """Seconds and peak MB of one step (gate only, 2 x 128 tokens), and the losses."""
    ids = torch.randint(0, base.config.vocab_size, (2, 128))
    rounds = max(3, rounds // 2)
    result: dict[str, Any] = {"memory_growth": {}}
    steps, losses = {}, {}
    for number in (4, 16):
        ours, theirs = weft_model(base, some(adapters, number)), peft_model(base, some(adapters, number))
        same_gate(ours, theirs)
        for name, model in ((f"weft {number}", ours), (f"peft {number}", theirs)):
            steps[name] = Step(model.train(), ids)
            losses[name] = steps[name]()
    result["memory_mb"] = {name: peak_memory(step) for name, step in steps.items()}
    result["seconds"] = interleaved(steps, rounds)
    result["loss"] = losses
    del steps
    for number in GROWTH:
        step = Step(weft_model(base, some(adapters, number)).train(), ids)
        step()
        result["memory_growth"][number] = peak_memory(step)
    return result


class Step:
    """One training step of the gate; the optimizer's own work is left out, as it is the same for all."""

    def __init__(self, model: Any, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids

    def __call__(self) -> float:
        """Forward and backward; returns the loss."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        loss.backward()
        return float(loss)


@torch.no_grad()
def scaling_pass(base: Any, adapters: dict[str, str], rounds: int) -> dict[str, Any]:
    """Peak MB of the scaling pass over 2048 tokens: the backbone alone, against the whole model as peft runs it."""
    ids = torch.randint(0, base.config.vocab_size, (1, 2048))
    model = sharing_weights(base)
    ways = {
        "backbone, one hidden state": lambda: model.model(input_ids=ids, use_cache=False).last_hidden_state,
        "whole model, all hidden states": lambda: model(input_ids=ids, use_cache=False, output_hidden_states=True),
    }
    return {
        "memory_mb": {name: peak_memory(way) for name, way in ways.items()},
        "seconds": interleaved(ways, max(3, rounds // 2), warm_up=0),
    }


def start_up() -> dict[str, float]:
    """Seconds of processes that only start."""
    python = sys.executable
    return {
        "import peft": seconds_of([python, "-c", "import peft"]),
        "import weft": seconds_of([python, "-c", "import weft"]),
        "import weft and its model": seconds_of([python, "-c", "import weft; weft.XLoraModel"]),
        "weft --help": seconds_of([python, "-m", "weft", "--help"]),
        "weft train --help": seconds_of([python, "-m", "weft", "train", "--help"]),
    }


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    forward, train = result["forward"]["seconds"], result["training"]
    lines = ["# Speed and memory", "", "; ".join(f"{key} {value}" for key, value in result["setting"].items()), ""]
    lines += [f"## Forward of {TOKENS} tokens, no gradients", "", "| model | seconds | x base | goal |"]
    lines += ["| --- | ---: | ---: | ---: |"]
    goals = {"weft 4": "1.5", "weft 16": "2.0"}
    for name, seconds in forward.items():
        lines.append(f"| {name} | {seconds:.3f} | {seconds / forward['base']:.2f} | {goals.get(name, '')} |")
    difference = result["forward"]["relative_difference_to_peft"]
    lines += [
        "",
        f"Largest difference of a logit to peft's, same gate, in shares of the largest logit: {difference}",
        "",
    ]
    lines += ["## Growth with the number of experts (rank 16 each)", ""]
    lines += [
        "| experts | weft, seconds | scaling pass + one LoRA of all ranks, seconds | ratio |",
        "| ---: | ---: | ---: | ---: |",
    ]
    growth = result["growth"]
    for number, ours, line in zip(growth["experts"], growth["weft"], growth["line"], strict=True):
        lines.append(f"| {number} | {ours:.3f} | {line:.3f} | {ours / line:.2f} |")
    lines += ["", "## Training step, gate only, 2 x 128 tokens", ""]
    lines += ["| model | seconds | peak MB above the model | loss |", "| --- | ---: | ---: | ---: |"]
    for name, seconds in train["seconds"].items():
        lines.append(f"| {name} | {seconds:.2f} | {train['memory_mb'][name]:.0f} | {train['loss'][name]:.6f} |")
    time_share = train["seconds"]["weft 16"] / train["seconds"]["peft 16"]
    memory_share = train["memory_mb"]["weft 16"] / train["memory_mb"]["peft 16"]
    lines += [
        "",
        f"At 16 experts weft takes {time_share:.2f}x peft's time and {memory_share:.2f}x its memory (goal 0.33x).",
    ]
    lines += [
        "",
        "Peak MB of weft's step for " + ", ".join(f"{n} experts: {mb:.0f}" for n, mb in train["memory_growth"].items()),
    ]
    lines += ["", "## Scaling pass of 2048 tokens", "", "| way | peak MB | seconds |", "| --- | ---: | ---: |"]
    for name, mb in result["scaling_pass"]["memory_mb"].items():
        lines.append(f"| {name} | {mb:.0f} | {result['scaling_pass']['seconds'][name]:.2f} |")
    lines += ["", "## Start", "", "| process | seconds |", "| --- | ---: |"]
    lines += [f"| `{name}` | {seconds:.2f} |" for name, seconds in result["start"].items()]
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> None:
    """Growth with the number of experts, beside the line it should follow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    growth = result["growth"]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(growth["experts"], growth["weft"], "o-", label="weft")
    axes.plot(growth["experts"], growth["line"], "s--", label="scaling pass + one LoRA of all ranks")
    peft = {number: result["forward"]["seconds"][f"peft {number}"] for number in (4, 16)}
    axes.plot(list(peft), list(peft.values()), "^:", label="peft's X-LoRA")
    axes.set(xlabel="experts of rank 16", ylabel=f"seconds per forward of {TOKENS} tokens", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / f"{result['setting']['date']}-growth.svg")


if __name__ == "__main__":
    main()

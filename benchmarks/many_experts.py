"""Many experts: time and memory to make, save and load a mixture of 4 to 64, and the time of a decoding step.

SmolLM2-135M in float32 with random adapters of rank 16 on all seven projections (4.9M parameters each) and one pass
(`gate_layer=4`). Each number of experts has a process of its own for its memory. Decoding is one short
sequence, with all experts and with `top_k_lora=2`; the base takes turns with them. About five minutes on two quiet
cores. Writes `results/DATE-many-experts.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weft
from contenders import load_base, quiet, save_adapters, sharing_weights
from harness import interleaved, peak_memory, save, setting

SIZES = (4, 16, 32, 64)
STEPS, ROUNDS = 8, 5


def main() -> None:
    """Measure all sizes, or one in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet()
    if arguments.one:
        print(json.dumps(measured(arguments.one, arguments.adapters)))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        save_adapters(load_base(), max(SIZES), Path(folder))
        for size in SIZES:
            command = [sys.executable, __file__, "--one", str(size), "--adapters", folder]
            found[str(size)] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    save("many-experts", {"setting": setting(), "sizes": found}, table(found))


@torch.no_grad()
def measured(size: int, adapters: Path) -> dict[str, float]:
    """All numbers of one size."""
    base = load_base()
    paths = {str(number): str(adapters / str(number)) for number in range(size)}
    kept: dict[str, Any] = {}
    found = {}

    def timed(name: str, run: Any) -> None:
        start = time.perf_counter()
        kept[name] = run()
        found[f"{name} s"] = time.perf_counter() - start

    def make() -> None:
        timed("make", lambda: weft.from_adapters(sharing_weights(base), paths, gate_layer=4).eval())

    found["make MB"] = peak_memory(make)
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: kept["make"].save_pretrained(folder))
        kept.clear()

        def load() -> None:
            timed("load", lambda: weft.from_pretrained(folder, sharing_weights(base)).eval())

        found["load MB"] = peak_memory(load)
    model = kept["load"]
    runs = {
        "base step s": lambda: decode(base),
        "step s": lambda: decode(model),
        "top-2 step s": lambda: with_top_2(model),
    }
    found |= {name: seconds / STEPS for name, seconds in interleaved(runs, ROUNDS).items()}
    return found


def decode(model: Any) -> None:
    """Some steps of one token."""
    cache = None
    token = torch.ones(1, 1, dtype=torch.long)
    for _ in range(STEPS):
        cache = model(input_ids=token, past_key_values=cache, use_cache=True).past_key_values


def with_top_2(model: Any) -> None:
    """The same with two experts per token."""
    model.set_topk_lora(2)
    try:
        decode(model)
    finally:
        model.set_topk_lora(None)


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    lines = [
        "| experts | made | peak | saved | loaded | peak | step, all experts / base | step, top-2 / base |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for size, of in found.items():
        lines.append(
            f"| {size} | {of['make s']:.1f} s | {of['make MB']:.0f} MB | {of['save s']:.1f} s | {of['load s']:.1f} s | "
            f"{of['load MB']:.0f} MB | {of['step s'] / of['base step s']:.2f} | "
            f"{of['top-2 step s'] / of['base step s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

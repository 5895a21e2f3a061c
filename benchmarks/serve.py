"""Serving in vLLM: mixtures against the base model alone, against vLLM's own path with one LoRA, and `generate`.

    make bench-serve

Each engine is a process of its own, loaded once; loads go through them in turns, so that drift of the machine hits all
alike. SmolLM2-135M in float32, random experts of rank 16 on all seven projections, two threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from harness import save, setting

ROOT = Path(__file__).parent.parent
WORK = ROOT / ".bench"
PYTHON = ROOT / ".venv-serve/bin/python"
PROMPT, NEW = 128, 32
LOADS = [1, 8, 16, 32]
MIXTURES: dict[str, tuple[int, dict[str, Any]]] = {
    "4 experts, gate_layer=4": (4, {"gate_layer": 4}),
    "4 experts, scaling_pass_layers=4": (4, {"scaling_pass_layers": 4}),
    "4 experts, two passes": (4, {}),
    "16 experts, gate_layer=4": (16, {"gate_layer": 4}),
    "16 experts, gate_layer=4, top 2": (16, {"gate_layer": 4, "top_k_lora": 2}),
}
PLAIN, ONE, OURS = "plain", "one LoRA (enable_lora)", "weft's generate, gate_layer=4"


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="with torch.compile, instead of eager")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="beginnings of engines' names")
    parser.add_argument("--requests", nargs="*", type=int, default=LOADS)
    parser.add_argument("--name", help="of the result; none writes nothing")
    arguments = parser.parse_args()
    options = {"enforce_eager": not arguments.compiled, "dtype": arguments.dtype}
    names = [PLAIN, ONE, *MIXTURES, OURS]
    if arguments.only:
        names = [name for name in names if any(name.startswith(each) for each in arguments.only)]
    engines = {name: Engine(name, options) for name in names}
    times = measure(engines, arguments.requests, arguments.rounds)
    memory = {name: engine.peak for name, engine in engines.items()}
    result = {"setting": setting(), "options": options, "tokens_per_second": times, "peak_memory_mb": memory}
    if arguments.name:
        save(arguments.name, result, table(result))
    else:
        print(table(result))


class Engine:
    """A process of serve_engine.py.

    Args:
        name: see the table.
        options: of vLLM.
    """

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        base, adapters = prepare()
        asked: dict[str, Any] = {"model": str(base), "options": options}
        if name == ONE:
            asked["lora"] = adapters["0"]
        elif name == OURS:
            asked |= {"generate": True, "mixture": str(mixture("4 experts, gate_layer=4"))}
        elif name != PLAIN:
            asked["mixture"] = str(mixture(name))
        self.process = subprocess.Popen(
            [str(PYTHON), "benchmarks/serve_engine.py", json.dumps(asked)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(WORK / f"{name.replace(' ', '-')}.log").open("w"),
            text=True,
        )
        self.peak = round(self._answer()["ready"])

    def run(self, **load: int) -> dict[str, float]:
        """The engine's answer to a load."""
        assert self.process.stdin is not None
        print(json.dumps(load), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise RuntimeError(f"an engine ended: see {WORK}")


def prepare() -> tuple[Path, dict[str, str]]:
    """The base model's folder and random adapters."""
    from contenders import load_base, save_adapters

    base = ROOT / ".demo/model"
    if not (WORK / "15").exists():
        save_adapters(load_base(), 16, WORK)
    return base, {str(number): str(WORK / str(number)) for number in range(16)}


def mixture(name: str) -> Path:
    """A mixture's folder, made where it is missing."""
    import weft
    from contenders import load_base

    number, options = MIXTURES[name]
    folder = WORK / name.replace(" ", "-")
    if not folder.exists():
        adapters = {f"expert-{index}": str(WORK / str(index)) for index in range(number)}
        weft.from_adapters(load_base(), adapters, **options).eval().save_pretrained(folder)
    return folder


def measure(engines: dict[str, Engine], requests: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """Medians: decoding by batch, and all of the largest load with its prefill."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for number in requests:
        for turn in range(-1, rounds):
            for name, engine in engines.items():
                answer = engine.run(requests=number, prompt=PROMPT, new=NEW)
                if turn >= 0:
                    found[name].setdefault(str(number), []).append(answer["decode"])
                    found[name].setdefault(f"{number}, with prefill", []).append(answer["all"])
    return {name: {key: statistics.median(of) for key, of in each.items()} for name, each in found.items()}


def table(result: dict[str, Any]) -> str:
    """Tokens per second, and what part that is of the plain engine's."""
    times = result["tokens_per_second"]
    columns = list(next(iter(times.values())))
    plain = times.get(PLAIN)
    lines = [
        f"| tokens/s, requests at once | {' | '.join(columns)} | MB at the peak of loading |",
        "| --- |" + " --- |" * (len(columns) + 1),
    ]
    for name, of in times.items():
        cells = [f"{of[key]:.1f}" + (f" ({of[key] / plain[key]:.2f})" if plain else "") for key in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {result['peak_memory_mb'][name]} |")
    about = result["setting"]
    lines.append("")
    lines.append(
        f"{about['date']}, {about['cpu']}, {about['cores']} cores, {result['options']['dtype']}, "
        f"{'eager' if result['options']['enforce_eager'] else 'compiled'}; prompts of {PROMPT} tokens, {NEW} new ones. "
        "In brackets: of the plain engine."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What the cheaper schemes cost in quality: gates of several kinds and seeds, trained and compared on the demo's data.

Needs the long demo's experts (`make demo-full`, at least until its experts are there). Every gate is trained like the
others, but for the paper's: that has no hidden layer, starts at random and has the weight 1. Each row is the perplexity
on held-out texts that switch between the domains, and on each domain. Results are kept in `.bench/quality/` as they
come, so that an interrupted run goes on; about an hour on two quiet cores. Writes
`results/DATE-quality-STEPS-steps.{json,md}`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

import weft
from contenders import ROOT, quiet
from harness import save, setting, slug
from remembered import remember_losses
from weft.data.texts import read_tokens
from weft.data.windows import opening_of, token_sequences
from weft.evaluate import perplexity
from weft.model.model import at_own_weight
from weft.options import TrainOptions
from weft.train.gate import train

DOMAINS = ("python", "reference", "licences", "records")
DEMO = ROOT / ".demo-full"
WORK = ROOT / ".bench" / "quality"
LENGTH = 256
FROZEN_AFTER = 64

# As docs/evaluate.md recommends: a hidden layer, a start from the experts' losses, twice the weight.
GATE = {"xlora_depth": 2, "xlora_size": 256, "gate_start": "losses", "global_scaling_weight": 2.0}
SCHEMES: dict[str, dict[str, Any]] = {
    "two passes": GATE,
    "scaling_pass_layers=4": {**GATE, "scaling_pass_layers": 4},
    "gate_layer=4": {**GATE, "gate_layer": 4},
    "two passes, the paper's gate": {"xlora_depth": 1, "gate_start": "random"},
    "gate_layer=10": {**GATE, "gate_layer": 10},
    "gate_layer=4, 0 below": {**GATE, "gate_layer": 4, "scaling_pass_value": 0.0},
}


def main() -> None:
    """Train what is missing, evaluate what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--sequences", type=int, default=24, help="held-out sequences of the mixed texts")
    parser.add_argument("--only", nargs="*", help="names of schemes; all by default")
    arguments = parser.parse_args()
    quiet()
    remember_losses(WORK / "losses")
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(arguments.seeds):
        for name, options in SCHEMES.items():
            if arguments.only and name not in arguments.only:
                continue
            for row, values in measured(name, options, seed, arguments.steps, arguments.sequences).items():
                for data, value in values.items():
                    rows.setdefault(row, {}).setdefault(data, []).append(value)
    result = {"setting": setting(), "steps": arguments.steps, "seeds": arguments.seeds, "perplexity": rows}
    save(f"quality-{arguments.steps}-steps", result, table(rows, arguments))


def measured(name: str, options: dict[str, Any], seed: int, steps: int, sequences: int) -> dict[str, dict[str, float]]:
    """Row -> data set -> perplexity, of one gate."""
    folder = WORK / f"{slug(name)}-{steps}-{seed}"
    file = folder / f"perplexity-{sequences}.json"
    if not file.exists():
        if not (folder / "adapter_config.json").exists():
            train(training_options(folder, options, seed, steps))
        file.write_text(json.dumps(evaluate(folder, name, sequences, with_baselines=seed == 0), indent=1))
    return json.loads(file.read_text())


def training_options(folder: Path, options: dict[str, Any], seed: int, steps: int) -> TrainOptions:
    """As in the demo."""
    return TrainOptions(
        base=str(DEMO / "model"),
        adapters={domain: str(DEMO / "experts" / domain) for domain in DOMAINS},
        data=[str(DEMO / "data" / "train" / "mixed.jsonl")],
        output=str(folder),
        max_steps=steps,
        save_steps=10_000,
        learning_rate=5e-3,
        batch_size=2,
        sequence_length=LENGTH,
        seed=seed,
        # What the gate reads is the same for all seeds: computed once, and the losses stay what they are.
        cache_scaling_pass="gate_layer" not in options,
        cache_folder=str(WORK / "scaling-cache"),
        **options,
    )


def evaluate(folder: Path, name: str, sequences: int, *, with_baselines: bool) -> dict[str, dict[str, float]]:
    """The gate's perplexities; for the paper's scheme also those of what needs no gate, or no other one."""
    model = weft.from_pretrained(folder, DEMO / "model")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    data = {
        data_set: token_sequences(read_tokens(str(file), tokenizer), LENGTH, opening_of(tokenizer))[:count]
        for data_set, count in [("mixed", sequences), *((domain, max(1, sequences // 4)) for domain in DOMAINS)]
        for file in [DEMO / "data" / "heldout" / f"{data_set}.jsonl"]
    }

    def row(measure: Callable[[Any, list[list[int]]], float] = whole) -> dict[str, float]:
        return {data_set: measure(model, texts) for data_set, texts in data.items()}

    rows = {name: row()}
    if name == "two passes" and with_baselines:
        rows[f"two passes, frozen after {FROZEN_AFTER} tokens"] = row(frozen)
        texts = read_tokens(str(DEMO / "data" / "train" / "mixed.jsonl"), tokenizer)
        mean = weft.mean_scalings(model, token_sequences(texts, LENGTH, opening_of(tokenizer))[:16])
        with model.fixed_scalings(mean):
            rows["folded: the gate's mean per layer"] = row()
        with at_own_weight(model, dict.fromkeys(DOMAINS, 1 / len(DOMAINS))):
            rows["folded: uniform"] = row()
        with at_own_weight(model, dict.fromkeys(DOMAINS, 2 / len(DOMAINS))):
            rows["folded: uniform, twice the weight"] = row()
        for domain in DOMAINS:
            with at_own_weight(model, {domain: 1.0}):
                rows[f"only {domain}"] = row()
        with model.disable_adapter():
            rows["base"] = row()
    return rows


def whole(model: Any, sequences: list[list[int]]) -> float:
    """Perplexity."""
    return perplexity(model, sequences, batch_size=4)


def frozen(model: Any, sequences: list[list[int]]) -> float:
    """Perplexity when the scalings are frozen after the first tokens; shorter texts are never frozen."""
    return perplexity(model, sequences, batch_size=1, freeze_after=FROZEN_AFTER)


def table(rows: dict[str, dict[str, list[float]]], arguments: argparse.Namespace) -> str:
    """Markdown: mean over the seeds, and on mixed texts each seed."""
    lines = [
        f"Perplexity on held-out texts (mixed: {arguments.sequences} sequences of {LENGTH}), gates trained for",
        f"{arguments.steps} steps of 2 x {LENGTH} tokens, mean over the seeds.",
        "",
        f"| | mixed | each seed | {' | '.join(DOMAINS)} |",
        "| --- | --- | --- |" + " --- |" * len(DOMAINS),
    ]
    for row, values in rows.items():
        means = [f"{statistics.mean(values[domain]):.2f}" for domain in DOMAINS]
        each = ", ".join(f"{value:.2f}" for value in values["mixed"])
        lines.append(f"| {row} | {statistics.mean(values['mixed']):.2f} | {each} | {' | '.join(means)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""What makes the gate good: its start, temperature, top-k, losses, learning rate, on the demo's experts and data.

Needs the long demo's experts (`make demo-full`, until they are there). Each variant is a gate that is trained like "two
passes" (random start, depth 1, learning rate 5e-3) but for what its name says; beside them one LoRA with at least as
many parameters as that gate, trained on the same texts for as many steps, at several learning rates. All are rows of
one `weft eval`, with the static merges (weights searched), Arrow and the oracle. Choose by the column "select"; "test"
is other texts, for what is reported.

Gates, adapters and finished cells are kept in `.bench/ablation/`, so that an interrupted run goes on. Writes
`results/DATE-ablation-STEPS-steps.{json,md}`. About two minutes a variant at 48 steps on two quiet cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import weft
from contenders import PROJECTIONS, ROOT, quiet
from gate_starts import domain_means, neutral, prototypes
from harness import RESULTS, setting, slug
from remembered import remember_losses
from weft.evaluate import evaluate
from weft.options import EvalOptions, TrainOptions
from weft.train.experts import train_experts
from weft.train.gate import train

DOMAINS = ("python", "reference", "licences", "records")
LENGTH = 256
SEARCHED = 8  # texts by which the static merges choose: each is tried 4 or 12 times

DEEPER = {"scaling_pass_layers": 4, "xlora_depth": 2, "xlora_size": 256}
# What differs from the first: options of `weft train`.
VARIANTS: dict[str, dict[str, Any]] = {
    "two passes": {},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 2e-2": {"learning_rate": 2e-2},
    "temperature 0.5": {"softmax_temperature": 0.5},
    "temperature 2": {"softmax_temperature": 2.0},
    "top-1": {"top_k_lora": 1},
    "top-2": {"top_k_lora": 2},
    "balance loss 0.01": {"balance_loss_weight": 0.01},
    "balance loss 0.1": {"balance_loss_weight": 0.1},
    "sharper (entropy 0.01)": {"entropy_loss_weight": 0.01},
    "softer (entropy -0.01)": {"entropy_loss_weight": -0.01},
    "label loss 0.1": {"expert_label_loss_weight": 0.1},
    "label loss 1": {"expert_label_loss_weight": 1.0},
    "one gate for all layers": {"layerwise_scalings": False},
    "depth 2": {"xlora_depth": 2, "xlora_size": 256},
    "gate_layer=4": {"gate_layer": 4},
    "scaling_pass_layers=4": {"scaling_pass_layers": 4},
    "scaling_pass_layers=4, depth 2": DEEPER,
    "scaling_pass_layers=4, label loss 0.1": {"scaling_pass_layers": 4, "expert_label_loss_weight": 0.1},
    "scaling_pass_layers=4, depth 2, label loss 0.1": {**DEEPER, "expert_label_loss_weight": 0.1},
    "gate_start=labels": {"gate_start": "labels"},
    "gate_start=losses": {"gate_start": "losses"},
    "scaling_pass_layers=4, depth 2, gate_start=labels": {**DEEPER, "gate_start": "labels"},
    "scaling_pass_layers=4, depth 2, gate_start=losses": {**DEEPER, "gate_start": "losses"},
    **{
        f"scaling_pass_layers=4, depth 2, gate_start=losses, weight {weight:g}": {
            **DEEPER,
            "gate_start": "losses",
            "global_scaling_weight": weight,
        }
        for weight in (1.5, 2.0, 3.0)
    },
    "scaling_pass_layers=4, depth 2, gate_start=labels, rate 1e-3": {
        **DEEPER,
        "gate_start": "labels",
        "learning_rate": 1e-3,
    },
}
SHOWN = "scaling_pass_layers=4, depth 2, gate_start=labels"  # the rows "weft ..." are its
STARTS: dict[str, Callable[..., None]] = {
    "neutral start": neutral,
    "start from prototypes": prototypes,
    "start from domain means": domain_means,
}
ONE_LORA = "one LoRA"
LORA_RATES = (5e-4, 2e-3, 5e-3, 1e-2, 2e-2)


def main() -> None:
    """Train what is missing, measure what is missing, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=ROOT / ".demo-full")
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "ablation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=24, help="held-out texts to choose by, and as many to test on")
    parser.add_argument("--only", nargs="*", help=f"names of variants and starts, or {ONE_LORA!r}; all by default")
    parser.add_argument("--rates", nargs="*", type=float, default=LORA_RATES, help="learning rates of the one LoRA")
    parser.add_argument("--label", default="", help="put it into the result's name: DATE-ablation-LABEL-STEPS-steps")
    parser.add_argument("--no-table", action="store_true", help="train only: for two processes at once")
    parser.add_argument("--rows", nargs="*", default=[], help="of weft eval, beside the variants; all by default")
    arguments = parser.parse_args()
    quiet()
    remember_losses(arguments.work / "losses")
    found: dict[str, str] = {}
    for seed in range(arguments.seeds):
        for name in (*VARIANTS, *STARTS):
            if not arguments.only or name in arguments.only:
                found |= {f"{row} #{seed}": path for row, path in gate(name, seed, arguments).items()}
        if not arguments.only or ONE_LORA in arguments.only:
            found |= {f"{row} #{seed}": path for row, path in equal_size_loras(seed, arguments).items()}
    if not arguments.no_table:
        measure(found, arguments)


def options_of(folder: Path, seed: int, arguments: argparse.Namespace, **options: Any) -> TrainOptions:
    """`weft train` as in the demo, but for what is given."""
    experts = {domain: str(arguments.demo / "experts" / domain) for domain in DOMAINS}
    values = {
        "base": str(arguments.demo / "model"),
        "adapters": experts if "start_from" not in options and "experts_from" not in options else {},
        "data": [] if "experts_from" in options else [str(arguments.demo / "data" / "train" / "mixed.jsonl")],
        "max_steps": arguments.steps,
        "save_steps": 10_000,
        "learning_rate": 5e-3,
        "batch_size": 2,
        "gate_start": "random",
        "xlora_depth": 1,
        "sequence_length": LENGTH,
        # What the gate reads is the same in all of these runs: computed once, and the losses stay what they are.
        "cache_scaling_pass": "gate_layer" not in options,
        "cache_folder": str(arguments.work / "scaling-cache"),
    }
    return TrainOptions(output=str(folder), seed=seed, **{**values, **options})


def gate(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, str]:
    """The folders of one gate: trained, and where it starts from something, as it starts."""
    folder = arguments.work / f"{slug(name)}-{arguments.steps}-{seed}"
    if name in VARIANTS:
        if not (folder / "adapter_config.json").exists():
            train(options_of(folder, seed, arguments, **VARIANTS[name]))
        return {name: str(folder)}
    start = arguments.work / f"{slug(name)}-0-{seed}"
    if not (start / "adapter_config.json").exists():
        torch.manual_seed(seed)
        experts = {domain: str(arguments.demo / "experts" / domain) for domain in DOMAINS}
        base = AutoModelForCausalLM.from_pretrained(arguments.demo / "model", dtype=torch.float32).eval()
        model = weft.from_adapters(base, experts, layerwise_scalings=True).eval()
        texts = {domain: arguments.demo / "data" / "train" / f"{domain}.jsonl" for domain in DOMAINS}
        STARTS[name](model, AutoTokenizer.from_pretrained(arguments.demo / "model"), texts)
        model.save_pretrained(str(start))
    if not (folder / "adapter_config.json").exists():
        train(options_of(folder, seed, arguments, start_from=str(start)))
    return {name: str(folder), f"{name}, untrained": str(start)}


def equal_size_loras(seed: int, arguments: argparse.Namespace) -> dict[str, str]:
    """The folders of single LoRAs with at least the gate's parameters, by their learning rate."""
    mixed = str(arguments.demo / "data" / "train" / "mixed.jsonl")
    rank = equal_size_rank(arguments.demo / "model")
    found = {}
    for rate in arguments.rates:
        name = f"one-lora-rank-{rank}-rate-{rate:g}".replace(".", "_")  # names have no points
        options = options_of(
            arguments.work / f"single-{arguments.steps}-{seed}",
            seed,
            arguments,
            experts_from={name: mixed},
            expert_rank=rank,
            expert_alpha=2 * rank,
            expert_targets=PROJECTIONS,
            expert_steps=arguments.steps,
            expert_learning_rate=rate,
        )
        found[f"one LoRA of rank {rank}, learning rate {rate:g}"] = str(train_experts(options)[name])
    return found


def equal_size_rank(base: Path) -> int:
    """The smallest rank at which one LoRA on the experts' layers has as many parameters as a linear gate per layer."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layers = [module for name, module in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    gate_size = (model.config.hidden_size + 1) * len(layers) * len(DOMAINS)
    return -(-gate_size // per_rank)


def measure(folders: dict[str, str], arguments: argparse.Namespace) -> None:
    """One `weft eval` with all of them, and its table as a dated result."""
    data = arguments.work / "data"
    data.mkdir(parents=True, exist_ok=True)
    # Texts of a demo that was made before they said where each domain begins ("experts") give no oracle.
    rows = (arguments.demo / "data" / "heldout" / "mixed.jsonl").read_text("utf-8").splitlines()
    parts = {"select": rows[: arguments.sequences], "test": rows[arguments.sequences : 2 * arguments.sequences]}
    parts["search"] = parts["select"][:SEARCHED]
    for name, lines in parts.items():
        (data / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    output = arguments.work / f"table-{arguments.steps}{arguments.label}.json"
    evaluate(
        EvalOptions(
            folders.get(f"{SHOWN} #0", next(iter(folders.values()))),
            data=[f"{name}={data / name}.jsonl" for name in ("select", "test")],
            rows=[*arguments.rows, "compare"] if arguments.rows else [],
            compare=folders,
            search_data=str(data / "search.jsonl"),
            sequence_length=LENGTH,
            output=[str(output), str(output.with_suffix(".md"))],
        )
    )
    result = {
        "setting": setting(),
        "steps": arguments.steps,
        "seeds": arguments.seeds,
        **json.loads(output.read_text()),
    }
    arguments.results.mkdir(exist_ok=True)
    label = f"-{arguments.label}" if arguments.label else ""
    stem = arguments.results / f"{result['setting']['date']}-ablation{label}-{arguments.steps}-steps"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=2), "utf-8")
    stem.with_suffix(".md").write_text(output.with_suffix(".md").read_text("utf-8"), "utf-8")


if __name__ == "__main__":
    main()

"""The bench of many experts: what a gate over 4, 8, 16 and 32 experts is worth, on the texts of build.py.

    python benchmarks/domains/bench.py                         # all that is missing: hours on two cores
    python benchmarks/domains/bench.py --sizes 4 --seeds 1     # the smallest part
    python benchmarks/domains/bench.py --sizes 4 8 --model gemma-3-270m
    python benchmarks/domains/report.py                        # the tables, of what is there; --model as well

Each piece of work (an expert, a gate, a table) is kept in `.bench/domains-runs/`, so that an interrupted run goes on;
those of another base model than SmolLM2-135M in `.bench/domains-runs-MODEL/`.
Gates are compared at `STUDIED` experts; the recipes of `AT_ALL_SIZES` are trained at all sizes and with all seeds.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import base_models
from base_models import MODELS, SMOLLM2, runs
from composed import composition_pieces
from composition import SETS
from pieces import Piece, do
from table import SIZES
from work import NAMES, TEXTS, UNSEEN, Work, expert, measure, options, read_rows, write_rows

STUDIED = 8
FAST = {"learning_rate": 5e-3}  # the default, too, without a number of steps
# What differs from `weft train`'s defaults; "texts", "data" and "steps" are of this bench, see `gate`.
RECIPES: dict[str, dict[str, Any]] = {
    "plateau": {"scaling_pass_layers": 4, "steps": 0},
    "plateau-one-pass": {"gate_layer": 4, "steps": 0},
    "plateau-own-lora": {"scaling_pass_layers": 4, "scaling_pass_rank": 16, "steps": 0},
    "one-pass": {**FAST, "gate_layer": 4},
    "short-pass": {**FAST, "scaling_pass_layers": 4},
    "two-passes": FAST,
    "short-pass-single-too": {**FAST, "scaling_pass_layers": 4, "data": "single too"},
    "short-pass-weight-1.5": {**FAST, "scaling_pass_layers": 4, "global_scaling_weight": 1.5},
    "one-pass-single-too": {**FAST, "gate_layer": 4, "data": "single too"},
    "one-pass-layer-10": {**FAST, "gate_layer": 10},
    "short-pass-rate-1e-3": {**FAST, "scaling_pass_layers": 4, "learning_rate": 1e-3},
    "short-pass-8-layers": {**FAST, "scaling_pass_layers": 8},
    "short-pass-unfitted": {**FAST, "scaling_pass_layers": 4, "gate_start": "random"},
    "short-pass-labels": {**FAST, "scaling_pass_layers": 4, "expert_label_loss_weight": 0.1},
    "plain": {"xlora_depth": 1},
}
# How many texts a gate needs: `weft train` holds out some of these itself, as users with so many have no others.
RECIPES |= {f"{number}-texts": {**RECIPES["plateau-own-lora"], "texts": number} for number in (10, 50, 200, 1000)}
AT_ALL_SIZES = ("one-pass", "short-pass", "plateau", "plateau-one-pass", "plateau-own-lora")
LORA_RATES = (2e-3, 5e-3)  # of one LoRA that is as large as a gate, and trained on the same texts
# Options that pieces of work know, see `Work`.
KNOWN = ("expert_steps", "gate_steps", "batch_size", "length", "most", "bf16", "searched", "unseen")


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2, help="the base model")
    parser.add_argument("--work", type=Path, help="where pieces of work are kept")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--base", type=Path, help="where the base model is kept, or made")
    parser.add_argument("--sizes", nargs="*", type=int, default=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), help=f"that are compared at {STUDIED} experts")
    parser.add_argument("--expert-steps", type=int, default=200)
    parser.add_argument("--gate-steps", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens in a sequence")
    parser.add_argument("--most", type=int, default=0, help="sequences that are measured of a data set; 0 takes all")
    parser.add_argument("--bf16", action="store_true", help="the base model in bfloat16, mixed precision")
    parser.add_argument("--searched", type=int, default=STUDIED, help="experts up to which merges are searched")
    parser.add_argument("--unseen", type=int, default=len(UNSEEN), help="domains without an expert that are measured")
    parser.add_argument("--jobs", type=int, default=1, help="pieces of work at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; the rest is left")
    arguments = parser.parse_args()
    values = vars(arguments)
    work = Work(
        folder=(arguments.work or runs(arguments.model)).resolve(),
        texts=arguments.texts.resolve(),
        base=(arguments.base or MODELS[arguments.model]).resolve(),
        **{name: values[name] for name in KNOWN},
    )
    pieces = all_pieces(work, arguments.model, sorted(arguments.sizes), arguments.seeds, arguments.recipes)
    do([piece for piece in pieces if not piece.made.exists()], arguments.jobs, arguments.seconds)


def all_pieces(work: Work, model: str, sizes: list[int], seeds: int, recipes: list[str]) -> list[Piece]:
    """All of it, the smallest and what says most first."""
    base = work.base / "model.safetensors"
    pieces = [Piece("base model", base, partial(base_models.ensure, model, work.base))]
    common = [recipe for recipe in AT_ALL_SIZES if recipe in recipes]
    for before, size in zip([0, *sizes], sizes, strict=False):
        for name in NAMES[before:size]:
            made = work.expert(name) / "weft_expert.json"
            pieces.append(Piece(f"expert {name}", made, partial(expert, work, name), (base,)))
        for recipe in common:
            pieces += gate_pieces(work, size, recipe, 0)
        pieces += other_pieces(work, size, recipes)
    for recipe in recipes:
        if STUDIED in sizes and recipe not in common:
            pieces += gate_pieces(work, STUDIED, recipe, 0)
    for seed in range(1, seeds):
        for size in sizes:
            for recipe in common:
                pieces += gate_pieces(work, size, recipe, seed)
    return pieces + [piece for name in SETS for piece in composition_pieces(work, name)]


def gate_pieces(work: Work, size: int, recipe: str, seed: int) -> list[Piece]:
    """Train a gate, and measure it."""
    needs = tuple(work.expert(name) / "weft_expert.json" for name in NAMES[:size])
    made = work.mixture(size, recipe, seed) / "adapter_config.json"
    name = f"gate over {size}, {recipe}, seed {seed}"
    measured = work.table(f"{size}-{recipe}-{seed}")
    return [
        Piece(name, made, partial(gate, work, size, recipe, seed), needs),
        Piece(f"table: {name}", measured, partial(table, work, size, recipe, seed), (made,)),
    ]


def other_pieces(work: Work, size: int, recipes: list[str]) -> list[Piece]:
    """What a mixture is compared with: one LoRA as large as its gate, a router by task, and all that needs no gate."""
    made = [work.expert(lora_name(size, rate)) / "weft_expert.json" for rate in LORA_RATES]
    base = work.base / "model.safetensors"
    pieces = [
        Piece(f"one LoRA, as a gate over {size}, rate {rate:g}", file, partial(lora, work, size, rate), (base,))
        for file, rate in zip(made, LORA_RATES, strict=True)
    ]
    # Any mixture of these experts: its gate is in none of the rows.
    mixture = work.mixture(size, next((recipe for recipe in AT_ALL_SIZES if recipe in recipes), AT_ALL_SIZES[0]), 0)
    config = mixture / "adapter_config.json"
    router = partial(routed, work, size, mixture)
    pieces.append(Piece(f"table of {size}: a router", work.table(f"{size}-router"), router, (config,)))
    rest = partial(others, work, size, mixture)
    pieces.append(Piece(f"table of {size}: the others", work.table(f"{size}-others"), rest, (config, *made)))
    return pieces


def gate(work: Work, size: int, recipe: str, seed: int) -> None:
    """Train a gate over the first experts, on mixed texts that none of them has seen."""
    from weft.train.gate import train

    given = dict(RECIPES[recipe])
    steps = given.pop("steps", work.gate_steps)  # 0: until the loss on texts of other documents stops falling
    texts, data = given.pop("texts", None), [str(work.texts / f"mixed-{size}" / "gate.jsonl")]
    if texts is not None:
        file = work.folder / "texts" / f"mixed-{size}-{texts}.jsonl"
        write_rows(file, list(read_rows(Path(data[0])))[:texts])
        data = [str(file)]
    if not steps and texts is None:
        # Not a part of the gate's texts, which share documents with the rest.
        given["eval_data"] = [str(work.texts / f"mixed-{size}" / "select.jsonl")]
    if given.pop("data", None) == "single too":
        data += [f"{name}={work.texts / name / 'gate.jsonl'}" for name in NAMES[:size]]
    train(
        options(
            work,
            adapters={name: str(work.expert(name)) for name in NAMES[:size]},
            data=data,
            output=str(work.mixture(size, recipe, seed)),
            max_steps=steps,
            seed=seed,
            **given,
        )
    )


def lora_name(size: int, rate: float) -> str:
    """The name of one LoRA that is as large as a gate."""
    return f"one-lora-{size}-rate-{rate:g}".replace(".", "_")


def lora(work: Work, size: int, rate: float) -> None:
    """Train one LoRA with at least a gate's parameters on the gate's texts, for as many steps."""
    source = work.texts / f"mixed-{size}" / "gate.jsonl"
    expert(work, lora_name(size, rate), source, rank=equal_rank(work.base, size), steps=work.gate_steps, rate=rate)


def equal_rank(base: Path, size: int) -> int:
    """The smallest rank at which one LoRA on all projections has as many parameters as a gate of `weft train`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from weft.options import TrainOptions

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    hidden = TrainOptions.xlora_size
    gate_size = (model.config.hidden_size + 1) * hidden + (hidden + 1) * len(linear) * size
    return -(-gate_size // sum(layer.in_features + layer.out_features for layer in linear))


def table(work: Work, size: int, recipe: str, seed: int) -> None:
    """Measure a mixture."""
    data = work.test_data(size)
    measure(work, work.mixture(size, recipe, seed), f"{size}-{recipe}-{seed}", data, rows=["weft", "weft top-2"])


def others(work: Work, size: int, mixture: Path) -> None:
    """Measure what needs no gate: the base, experts, means, merges, Arrow, the oracle and one LoRA."""
    measure(
        work,
        mixture,
        f"{size}-others",
        work.test_data(size),
        rows=["base", "oracle", "uniform", "arrow", "compare"]
        + (["experts", "merges"] if size <= work.searched else []),
        search_data=str(work.texts / f"mixed-{size}" / "select.jsonl"),
        compare={lora_name(size, rate): str(work.expert(lora_name(size, rate))) for rate in LORA_RATES},
    )


def routed(work: Work, size: int, mixture: Path) -> None:
    """Measure a router that chooses an expert by the text as a whole."""
    import router

    router.measure(work, size, NAMES[:size], mixture)


if __name__ == "__main__":
    main()

"""The bench of many experts: what a gate over 4, 8, 16 and 32 experts is worth, on the texts of build.py.

    python benchmarks/domains/bench.py                         # all that is missing: hours on two cores
    python benchmarks/domains/bench.py --sizes 4 --seeds 1     # the smallest part
    python benchmarks/domains/report.py                        # the tables, of what is there

Each piece of work (an expert, a gate, a table) is kept in `.bench/domains-runs/`, so that an interrupted run goes on.
Gates are compared at `STUDIED` experts; the recipes of `AT_ALL_SIZES` are trained at all sizes and with all seeds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pieces import Piece, do
from table import DOMAINS, NUM_EXPERTS, SIZES

ROOT = Path(__file__).parents[2]
TEXTS = ROOT / ".bench" / "domains"
NAMES = [domain.name for domain in DOMAINS]
UNSEEN = NAMES[NUM_EXPERTS:]
STUDIED = 8
DEEP = {"xlora_depth": 2, "xlora_size": 256, "learning_rate": 5e-3}
# What differs from `weft train`'s defaults; "texts", "data" and "steps" are of this bench, see `gate`.
RECIPES: dict[str, dict[str, Any]] = {
    "plateau": {"xlora_depth": 2, "xlora_size": 256, "scaling_pass_layers": 4, "steps": 0},
    "plateau-one-pass": {"xlora_depth": 2, "xlora_size": 256, "gate_layer": 4, "steps": 0},
    "one-pass": {**DEEP, "gate_layer": 4},
    "short-pass": {**DEEP, "scaling_pass_layers": 4},
    "two-passes": DEEP,
    "short-pass-single-too": {**DEEP, "scaling_pass_layers": 4, "data": "single too"},
    "short-pass-weight-1.5": {**DEEP, "scaling_pass_layers": 4, "global_scaling_weight": 1.5},
    "short-pass-10-texts": {**DEEP, "scaling_pass_layers": 4, "texts": 10},
    "short-pass-50-texts": {**DEEP, "scaling_pass_layers": 4, "texts": 50},
    "short-pass-200-texts": {**DEEP, "scaling_pass_layers": 4, "texts": 200},
    "one-pass-single-too": {**DEEP, "gate_layer": 4, "data": "single too"},
    "one-pass-layer-10": {**DEEP, "gate_layer": 10},
    "short-pass-rate-1e-3": {**DEEP, "scaling_pass_layers": 4, "learning_rate": 1e-3},
    "short-pass-8-layers": {**DEEP, "scaling_pass_layers": 8},
    "short-pass-unfitted": {**DEEP, "scaling_pass_layers": 4, "gate_start": "random"},
    "short-pass-labels": {**DEEP, "scaling_pass_layers": 4, "expert_label_loss_weight": 0.1},
    "plain": {},
}
AT_ALL_SIZES = ("one-pass", "short-pass", "plateau", "plateau-one-pass")
LORA_RATES = (2e-3, 5e-3)  # of one LoRA that is as large as a gate, and trained on the same texts
SETS = ("records", "comments")  # of texts that need two experts at once
PARTS = ("form", "german", "french")
# Items are few and short, and a language's expert learns each by heart.
COMPOSED = {"batch_size": 16}
COMPOSED_EXPERT = {**COMPOSED, "rank": 16, "steps": 400, "rate": 2e-3}
# Options that pieces of work know.
KNOWN = ("expert_steps", "gate_steps", "batch_size", "length", "most", "bf16", "searched", "unseen")


@dataclass(frozen=True)
class Work:
    """What pieces of work need to know.

    Attributes:
        folder: for all that is made.
        texts: of build.py.
        base: the base model's folder.
        expert_steps: optimizer steps of an expert.
        gate_steps: of a gate.
        batch_size: sequences in a step.
        length: tokens in a sequence.
        most: sequences that are measured of a data set; 0 takes all.
        bf16: the base model is in bfloat16, and training in mixed precision.
        searched: all experts alone and the merges' weights are tried up to so many experts.
        unseen: domains without an expert that are measured.
    """

    folder: Path
    texts: Path
    base: Path
    expert_steps: int
    gate_steps: int
    batch_size: int
    length: int
    most: int
    bf16: bool
    searched: int
    unseen: int

    @property
    def dtype(self) -> str:
        """Of the base model."""
        return "bfloat16" if self.bf16 else "auto"

    def expert(self, name: str) -> Path:
        """The folder of an expert."""
        return self.folder / "bank-experts" / name

    def mixture(self, size: int, recipe: str, seed: int) -> Path:
        """The folder of a mixture."""
        return self.folder / "mixtures" / f"{size}-{recipe}-{seed}"

    def table(self, name: str) -> Path:
        """The file of a table."""
        return self.folder / "tables" / f"{name}.json"

    def test_data(self, size: int) -> list[str]:
        """The data sets that so many experts are measured on, as `weft eval` takes them."""
        unseen = [f"unseen-{name}={self.texts / name}/test.jsonl" for name in UNSEEN[: self.unseen]]
        single = [f"{name}={self.texts / name}/test.jsonl" for name in NAMES[:size]]
        return [f"mixed={self.texts}/mixed-{size}/test.jsonl", *single, *unseen]


def main() -> None:
    """Do what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "domains-runs")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--base", type=Path, default=ROOT / ".demo" / "model")
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
        folder=arguments.work.resolve(),
        texts=arguments.texts.resolve(),
        base=arguments.base.resolve(),
        **{name: values[name] for name in KNOWN},
    )
    pieces = all_pieces(work, sorted(arguments.sizes), arguments.seeds, arguments.recipes)
    do([piece for piece in pieces if not piece.made.exists()], arguments.jobs, arguments.seconds)


def all_pieces(work: Work, sizes: list[int], seeds: int, recipes: list[str]) -> list[Piece]:
    """All of it, the smallest and what says most first."""
    base = work.base / "model.safetensors"
    pieces = [Piece("base model", base, partial(base_model, work.base))]
    common = [recipe for recipe in AT_ALL_SIZES if recipe in recipes]
    for before, size in zip([0, *sizes], sizes, strict=False):
        for name in NAMES[before:size]:
            made = work.expert(name) / "weft_expert.json"
            pieces.append(Piece(f"expert {name}", made, partial(expert, work, name), (base,)))
        for recipe in common:
            pieces += gate_pieces(work, size, recipe, 0)
        pieces += other_pieces(work, size)
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


def other_pieces(work: Work, size: int) -> list[Piece]:
    """What a mixture is compared with: one LoRA as large as its gate, a router by task, and all that needs no gate."""
    made = [work.expert(lora_name(size, rate)) / "weft_expert.json" for rate in LORA_RATES]
    base = work.base / "model.safetensors"
    pieces = [
        Piece(f"one LoRA, as a gate over {size}, rate {rate:g}", file, partial(lora, work, size, rate), (base,))
        for file, rate in zip(made, LORA_RATES, strict=True)
    ]
    # Any mixture of these experts: its gate is in none of the rows.
    mixture = work.mixture(size, AT_ALL_SIZES[0], 0) / "adapter_config.json"
    router = partial(routed, work, size)
    pieces.append(Piece(f"table of {size}: a router", work.table(f"{size}-router"), router, (mixture,)))
    rest = partial(others, work, size)
    pieces.append(Piece(f"table of {size}: the others", work.table(f"{size}-others"), rest, (mixture, *made)))
    return pieces


def composition_pieces(work: Work, name: str) -> list[Piece]:
    """Train the experts of a composition, gates that saw the task and that did not, and measure both."""
    experts = {part: work.texts / "composition" / name / f"train-{part}.jsonl" for part in PARTS}
    made = tuple(work.expert(f"{name}-{part}") / "weft_expert.json" for part in PARTS)
    pieces = [
        Piece(f"expert {name}-{part}", file, partial(expert, work, f"{name}-{part}", experts[part], **COMPOSED_EXPERT))
        for part, file in zip(PARTS, made, strict=True)
    ]
    for task in ("seen", "unseen"):
        folder = work.folder / "mixtures" / f"{name}-{task}"
        run = partial(composition_gate, work, name, task == "seen", folder)
        pieces.append(Piece(f"gate over {name}, task {task}", folder / "adapter_config.json", run, made))
        measure_it = partial(composition_table, work, name, folder, f"{name}-{task}", with_others=task == "unseen")
        needs = (folder / "adapter_config.json",)
        pieces.append(Piece(f"table of {name}, task {task}", work.table(f"{name}-{task}"), measure_it, needs))
    return pieces


def base_model(folder: Path) -> None:
    """SmolLM2-135M, from its package."""
    sys.path.insert(0, str(ROOT / "demo"))
    importlib.import_module("model").ensure_model(folder)


def options(work: Work, **given: Any) -> Any:
    """Of a training."""
    from weft.options import TrainOptions

    values = {
        "base": str(work.base),
        "batch_size": work.batch_size,
        "sequence_length": work.length,
        "bf16": work.bf16,
        "dtype": work.dtype,
        "save_steps": 10_000,
        "logging_steps": 20,
    }
    return TrainOptions(**{**values, **given})


def expert(
    work: Work,
    name: str,
    source: Path | None = None,
    *,
    rank: int = 8,
    steps: int = 0,
    rate: float = 1e-3,
    **given: Any,
) -> None:
    """Train an expert on its domain's texts, or another LoRA on others."""
    from weft.train.experts import train_experts

    train_experts(
        options(
            work,
            experts_from={name: str(source or work.texts / name / "train.jsonl")},
            output=str(work.folder / "bank"),
            expert_rank=rank,
            expert_alpha=2 * rank,
            expert_steps=steps or work.expert_steps,
            expert_learning_rate=rate,
            **given,
        )
    )


def gate(work: Work, size: int, recipe: str, seed: int) -> None:
    """Train a gate over the first experts, on mixed texts that none of them has seen."""
    from weft.train.gate import train

    given = dict(RECIPES[recipe])
    steps = given.pop("steps", work.gate_steps)  # 0: until the loss on a part of the texts stops falling
    texts, data = given.pop("texts", None), [str(work.texts / f"mixed-{size}" / "gate.jsonl")]
    if texts is not None:
        file = work.folder / "texts" / f"mixed-{size}-{texts}.jsonl"
        write_rows(file, list(read_rows(Path(data[0])))[:texts])
        data = [str(file)]
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
    """The smallest rank at which one LoRA on all projections has as many parameters as a gate of `DEEP`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    linear = [module for module in model.model.modules() if isinstance(module, torch.nn.Linear)]
    hidden = DEEP["xlora_size"]
    gate_size = (model.config.hidden_size + 1) * hidden + (hidden + 1) * len(linear) * size
    return -(-gate_size // sum(layer.in_features + layer.out_features for layer in linear))


def composition_gate(work: Work, name: str, task_seen: bool, folder: Path) -> None:
    """Train a gate over a composition's experts: on the task with other items, or on what the experts learned."""
    from weft.train.gate import train

    recipe = dict(RECIPES["plateau"])
    recipe.pop("steps")
    texts = work.texts / "composition" / name
    files = [f"gate-{part}" for part in PARTS[1:]] if task_seen else [f"train-{part}" for part in PARTS]
    train(
        options(
            work,
            adapters={part: str(work.expert(f"{name}-{part}")) for part in PARTS},
            data=[str(texts / f"{file}.jsonl") for file in files],
            output=str(folder),
            **COMPOSED,
            **recipe,
        )
    )


def table(work: Work, size: int, recipe: str, seed: int) -> None:
    """Measure a mixture."""
    data = work.test_data(size)
    measure(work, work.mixture(size, recipe, seed), f"{size}-{recipe}-{seed}", data, rows=["weft", "weft top-2"])


def others(work: Work, size: int) -> None:
    """Measure what needs no gate: the base, experts, means, merges, Arrow, the oracle and one LoRA."""
    measure(
        work,
        work.mixture(size, AT_ALL_SIZES[0], 0),
        f"{size}-others",
        work.test_data(size),
        rows=["base", "oracle", "uniform", "arrow", "compare"]
        + (["experts", "merges"] if size <= work.searched else []),
        search_data=str(work.texts / f"mixed-{size}" / "select.jsonl"),
        compare={lora_name(size, rate): str(work.expert(lora_name(size, rate))) for rate in LORA_RATES},
    )


def composition_table(work: Work, name: str, folder: Path, table_name: str, *, with_others: bool) -> None:
    """Measure a composition, by exact match."""
    data = []
    for part in PARTS[1:]:
        rows = list(read_rows(work.texts / "composition" / name / f"test-{part}.jsonl"))
        file = work.folder / "texts" / f"{name}-{part}.jsonl"
        write_rows(file, [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows])
        data.append(f"{name}-{part}={file}")
    rest = ["base", "experts", "uniform", "merges", "arrow"] if with_others else []
    measure(work, folder, table_name, data, rows=["weft", *rest], max_new_tokens=96)


def routed(work: Work, size: int) -> None:
    """Measure a router that chooses an expert by the text as a whole."""
    import router

    router.measure(work, size, NAMES[:size])


def measure(work: Work, folder: Path, name: str, data: list[str], **given: Any) -> None:
    """One `weft eval`, of which the table and the score of each text are kept."""
    from weft.evaluate import evaluate
    from weft.options import EvalOptions

    work.table(name).parent.mkdir(parents=True, exist_ok=True)
    evaluate(
        EvalOptions(
            str(folder),
            base=str(work.base),
            data=data,
            sequence_length=work.length,
            batch_size=2 * work.batch_size,
            dtype=work.dtype,
            max_sequences=work.most,
            output=str(work.table(name)),
            **given,
        )
    )


def read_rows(file: Path) -> Iterator[Any]:
    """The rows of a file."""
    with file.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def write_rows(file: Path, rows: list[Any]) -> None:
    """Write a file of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()

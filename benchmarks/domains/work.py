"""What the pieces of the bench's work share: where files are, how an adapter is trained and a model is measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base_models import MODELS, ROOT, SMOLLM2, runs
from table import DOMAINS, NUM_EXPERTS

TEXTS = ROOT / ".bench" / "domains"
NAMES = [domain.name for domain in DOMAINS]
UNSEEN = NAMES[NUM_EXPERTS:]


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


def mixture_parser(about: str | None) -> argparse.ArgumentParser:
    """The arguments of a script that looks into one mixture of the bench."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", help="a folder in WORK/mixtures: SIZE-RECIPE-SEED")
    parser.add_argument("--texts-of-each", type=int, default=24, help="test texts of a data set")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text that are read")
    parser.add_argument("--bf16", action="store_true", help="the base model in bfloat16")
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2, help="the base model")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    return parser


def opened(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The mixture of these arguments, and its tokenizer."""
    import weft
    from weft.base_model.loading import load_placed_base, load_tokenizer

    folder = str(MODELS[arguments.model])
    base = load_placed_base(folder, dtype="bfloat16" if arguments.bf16 else "auto")
    model = weft.from_pretrained(str(runs(arguments.model) / "mixtures" / arguments.mixture), base).eval()
    return model, load_tokenizer(folder)


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
    """The rows of a file. (Not `splitlines`: texts have other characters that end lines.)"""
    with file.open(encoding="utf-8", newline="\n") as lines:
        yield from map(json.loads, lines)


def write_rows(file: Path, rows: list[Any]) -> None:
    """Write a file of rows."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")

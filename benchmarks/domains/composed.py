"""The bench's pieces of work on texts that need two experts at once, see composition.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from composition import LANGUAGES
from pieces import Piece
from work import Work, expert, measure, options, read_rows, write_rows

PARTS = ("form", *LANGUAGES)
BATCH_SIZE = 16  # texts are short
# Items are few, and a language's expert learns each by heart.
EXPERT: dict[str, Any] = {"batch_size": BATCH_SIZE, "rank": 16, "steps": 400, "rate": 2e-3}
# Trained until the loss on a part of the texts stops falling.
GATE: dict[str, Any] = {"batch_size": BATCH_SIZE, "scaling_pass_layers": 4}


def composition_pieces(work: Work, name: str) -> list[Piece]:
    """Train the experts of a composition, gates that saw the task and that did not, and measure both."""
    experts = {part: work.texts / "composition" / name / f"train-{part}.jsonl" for part in PARTS}
    made = tuple(work.expert(f"{name}-{part}") / "weft_expert.json" for part in PARTS)
    pieces = [
        Piece(f"expert {name}-{part}", file, partial(expert, work, f"{name}-{part}", experts[part], **EXPERT))
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


def composition_gate(work: Work, name: str, task_seen: bool, folder: Path) -> None:
    """Train a gate over a composition's experts: on the task with other items, or on what the experts learned."""
    from weft.train.gate import train

    texts = work.texts / "composition" / name
    files = [f"gate-{part}" for part in PARTS[1:]] if task_seen else [f"train-{part}" for part in PARTS]
    train(
        options(
            work,
            adapters={part: str(work.expert(f"{name}-{part}")) for part in PARTS},
            data=[str(texts / f"{file}.jsonl") for file in files],
            output=str(folder),
            **GATE,
        )
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

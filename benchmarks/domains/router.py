"""A router by task, as users of many adapters have it: the whole text goes to the expert whose texts it resembles.

The idea is LoRAuter's (arXiv 2601.21795), without its models: a text's place is the mean of the base model's last
hidden states, and an expert's is the mean place of some of its training texts. "top-1" takes the nearest expert,
"weighted" the three nearest, with weights that are the softmax of their cosines over a temperature.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

TRAINING_TEXTS = 64
NEAREST, TEMPERATURE = 3, 0.02


def measure(work: Any, size: int, names: list[str], mixture: Path) -> None:
    """Write a table of the data sets' perplexities, and the scores of all parts, with the experts of a mixture."""
    import torch

    import weft
    from weft.base_model.loading import load_placed_base, load_tokenizer
    from weft.data.texts import named_sources, read_tokens
    from weft.evaluate.cell_store import Cell, CellStore
    from weft.evaluate.data_sets import read_data_set
    from weft.evaluate.scoring import Runner, score, value_of
    from weft.model.model import at_own_weight

    base, tokenizer = load_placed_base(str(work.base), dtype=work.dtype), load_tokenizer(str(work.base))

    def places(texts: list[list[int]]) -> torch.Tensor:
        """[text, hidden], centred by the experts' mean later."""
        found = []
        with torch.no_grad():
            for tokens in texts:
                ids = torch.tensor([tokens[: work.length]], device=base.device)
                found.append(base.model(input_ids=ids).last_hidden_state[0].float().mean(0).cpu())
        return torch.stack(found)

    def training_texts(name: str) -> list[list[int]]:
        return read_tokens(str(work.texts / name / "train.jsonl"), tokenizer)[:TRAINING_TEXTS]

    centres = torch.stack([places(training_texts(name)).mean(0) for name in names])
    middle = centres.mean(0)
    centres = torch.nn.functional.normalize(centres - middle, dim=-1)
    data_sets = [
        read_data_set(name, source, tokenizer, names, sequence_length=work.length, max_sequences=work.most)
        for name, source in named_sources(work.test_data(size)).items()
    ]
    place_of = {
        data.name: torch.nn.functional.normalize(places([text.tokens for text in data.examples]) - middle, dim=-1)
        for data in data_sets
    }
    model = weft.from_pretrained(mixture, base)
    cells = CellStore(work.table(f"{size}-router").with_suffix(".cells.jsonl"))
    values: dict[str, dict[str, float]] = {"router top-1": {}, "router weighted": {}}
    for data in data_sets:
        cosines = place_of[data.name] @ centres.T
        near, which = cosines.topk(min(NEAREST, len(names)))
        weights = torch.zeros_like(cosines).scatter(1, which, (near / TEMPERATURE).softmax(-1))
        for row, table in (("router top-1", cosines.argmax(-1, keepdim=True)), ("router weighted", weights)):
            together: dict[tuple[float, ...], list[int]] = defaultdict(list)
            for number, key in enumerate(table.tolist()):
                together[tuple(key)].append(number)
            scores: dict[int, list[tuple[float, float]]] = {}
            for key, numbers in together.items():
                chosen = {names[int(key[0])]: 1.0} if row == "router top-1" else dict(zip(names, key, strict=True))
                some = replace(
                    data,
                    examples=[data.examples[number] for number in numbers],
                    example_of_part=[
                        numbers.index(number) for number in data.example_of_part if number in set(numbers)
                    ],
                    labels=[
                        label
                        for label, number in zip(data.labels, data.example_of_part, strict=True)
                        if number in set(numbers)
                    ],
                )
                with at_own_weight(model, chosen):
                    parts = score(Runner(model, tokenizer, work.batch_size), some)
                for part, pair in zip(some.example_of_part, parts, strict=True):
                    scores.setdefault(numbers[part], []).append(pair)
            flat = [pair for number in range(len(data.examples)) for pair in scores[number]]
            total, weight = (sum(column) for column in zip(*flat, strict=True))
            values[row][data.name] = value_of(data, total, weight)
            cells.keep(f"{row} {data.name}", row, data.name, Cell(flat, 0.0, None))
    work.table(f"{size}-router").write_text(json.dumps(values, indent=1))

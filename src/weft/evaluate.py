"""`weft eval`: is the mixture better than what its user has already? Perplexity, row by row, on their own data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from weft.data import check_length, named_sources, read_texts, token_sequences
from weft.errors import ConfigError
from weft.loading import load_mixture
from weft.options import EvalOptions
from weft.placement import execution_device

Row = tuple[str, Callable[[], AbstractContextManager[Any]]]


def evaluate(options: EvalOptions) -> dict[str, dict[str, float]]:
    """Measure, print and (with `output`) save the table.

    Returns:
        Row name -> data set -> perplexity.

    Raises:
        WeftError: the model, the options or the data cannot work.
    """
    if not options.data:
        raise ConfigError("data is missing: one or more name=FILE")
    if options.batch_size < 1 or options.max_sequences < 0:
        raise ConfigError(
            f"batch_size ({options.batch_size}) must be at least 1, max_sequences ({options.max_sequences}) at least 0"
        )
    sources = named_sources(options.data)
    model, tokenizer = load_mixture(options.model, options.base, options.dtype, options.quantization)
    check_length(options.sequence_length, model.config)
    data_sets = {
        name: token_sequences(read_texts(source, tokenizer), tokenizer, options.sequence_length)[
            : options.max_sequences or None
        ]
        for name, source in sources.items()
    }
    rows = mixture_rows(model)
    table: dict[str, dict[str, float]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("perplexity", total=len(rows) * sum(len(data) for data in data_sets.values()))
        for row, context in rows:
            progress.update(task, description=f"perplexity: {row}")
            with context():
                table[row] = {
                    name: perplexity(model, data, options.batch_size, lambda done: progress.advance(task, done))
                    for name, data in data_sets.items()
                }
    Console().print(render(table))
    if options.output is not None:
        Path(options.output).write_text(
            json.dumps(
                {
                    "perplexity": table,
                    "sequences": {name: len(data) for name, data in data_sets.items()},
                    "sequence_length": options.sequence_length,
                },
                indent=2,
            ),
            encoding="utf-8",
        )
    return table


def mixture_rows(model: Any) -> list[Row]:
    """The model's ways to run that are worth comparing: name and context of each."""
    names = model.xlora_config.expert_names
    rows: list[Row] = [("base", model.disable_adapter)]
    rows += [(f"only {name}", partial(model.fixed_scalings, {name: 1.0})) for name in names]
    rows.append(("uniform mix", partial(model.fixed_scalings, dict.fromkeys(names, 1 / len(names)))))
    rows.append(("weft", nullcontext))
    return rows


@torch.no_grad()
def perplexity(
    model: Any, sequences: list[list[int]], batch_size: int, advance: Callable[[int], None] = lambda done: None
) -> float:
    """exp of the mean negative log-likelihood per predicted token, over all tokens of all sequences.

    Padding is never predicted; the first token of a sequence, which nothing precedes, is not predicted either. The sum
    runs in float64 over float32 log-likelihoods.
    """
    total, count, device = 0.0, 0, execution_device(model)
    for input_ids, attention_mask in padded_batches(sequences, batch_size):
        input_ids, attention_mask = input_ids.to(device), attention_mask.to(device)
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        total += negative_log_likelihood(logits, input_ids, attention_mask)
        count += int(attention_mask[:, 1:].sum())
        advance(len(input_ids))
    return math.exp(total / count)


def negative_log_likelihood(
    logits: Float[Tensor, "batch seq vocab"],
    input_ids: Int[Tensor, "batch seq"],
    attention_mask: Int[Tensor, "batch seq"],
) -> float:
    """Summed over all predicted tokens, in nats."""
    targets = input_ids[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
    )
    return float(losses.double().sum())


def padded_batches(sequences: list[list[int]], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, attention_mask), padded on the right."""
    for start in range(0, len(sequences), batch_size):
        batch = sequences[start : start + batch_size]
        longest = max(len(sequence) for sequence in batch)
        input_ids = torch.zeros(len(batch), longest, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, sequence in enumerate(batch):
            input_ids[row, : len(sequence)] = torch.tensor(sequence)
            attention_mask[row, : len(sequence)] = 1
        yield input_ids, attention_mask


def render(table: dict[str, dict[str, float]]) -> Table:
    """The table for a terminal; the best value of each data set is bold."""
    shown = Table(title="perplexity (lower is better)")
    shown.add_column("")
    names = list(next(iter(table.values())))
    best = {name: min(values[name] for values in table.values()) for name in names}
    for name in names:
        shown.add_column(name, justify="right")
    for row, values in table.items():
        cells = [
            f"[bold]{value:.2f}[/bold]" if value == best[name] else f"{value:.2f}" for name, value in values.items()
        ]
        shown.add_row(row, *cells)
    return shown

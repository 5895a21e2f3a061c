"""`weft inspect`: shows the gate's scalings for a text in the terminal, as a page, a file or a figure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from weft.base_model.loading import loading_options
from weft.cli.terminal import StepPrinter, style_of
from weft.data.texts import named_sources
from weft.errors import ConfigError
from weft.generation.stream import Step
from weft.model.build import load_mixture
from weft.options import InspectOptions
from weft.options.foreseen import refuse
from weft.screen.countdown import Countdown
from weft.screen.tables import print_table, results_console
from weft.screen.visible import say, shortened
from weft.traces.figures import check_figure, write_figure
from weft.traces.page import check_page, write_page
from weft.traces.record import trace, trace_data, trace_generation
from weft.traces.summary import summarise
from weft.traces.trace import Trace

_MOST_COLUMNS = 8  # of experts in a table


def inspect(options: InspectOptions) -> None:
    """Record or load a trace, print it, and write the files that the options name.

    Raises:
        WeftError: the model, the options, the data or a file is not valid.
    """
    _check(options)
    others = [Trace.load(file) for file in options.compare]  # before the data is read, which takes long
    shown = Trace.load(options.model) if options.is_trace else _recorded(options)
    if options.output is not None:
        shown.save(options.output)
    _print(shown, others)
    if options.html is not None:
        write_page([shown, *others], options.html)
        say(f"page: {options.html}")
    if options.figure is not None:
        write_figure(shown, options.figure)
        say(f"figure: {options.figure}")
    if options.output is not None:
        say(f"trace: {options.output}, to be shown again with  weft inspect {options.output}")


def _check(options: InspectOptions) -> None:
    """Raise if an output file exists that weft did not write."""
    checks: dict[str, Callable[..., None]] = {
        "figure": check_figure,
        "html": check_page,
        "output": partial(Trace.check_file, what="output"),
    }
    problems = []
    for name, check in checks.items():
        if (file := getattr(options, name)) is not None:
            try:
                check(file)
            except ConfigError as err:
                problems.append(str(err))
    refuse(problems)


def _recorded(options: InspectOptions) -> Trace:
    sources = named_sources(options.data)
    model, tokenizer = load_mixture(options.model, options.base, **loading_options(options))
    common: dict[str, Any] = {
        "tokenizer": tokenizer,
        "title": options.title or Path(options.model).name,
        "max_tokens": options.max_tokens,
    }
    if options.text:
        return trace(model, options.text, **common)
    if options.generate:
        return trace_generation(
            model,
            options.generate,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            **common,
        )
    with Countdown(None, "the gate reads") as countdown:
        return trace_data(
            model,
            sources,
            sequence_length=options.sequence_length,
            batch_size=options.batch_size,
            advance=countdown.advance,
            **common,
        )


def _print(shown: Trace, others: list[Trace]) -> None:
    console = results_console()
    if len(shown.texts) == 1:
        print_text(shown, Console(soft_wrap=True))
    console.print(summarise(shown), markup=False, highlight=False)
    print_table(expert_table(shown), console)
    if len(shown.by_name()) > 1:
        print_table(data_table(shown), console)
    if others:
        print_table(comparison_table([shown, *others]), console)


def print_text(shown: Trace, console: Console) -> None:
    """Print the text, each token in the colour of its leading expert."""
    printer = StepPrinter(shown.expert_names, show_experts=True)
    printer.console = console
    printer.legend()
    for token, piece, row in zip(shown.token_ids.tolist(), shown.pieces, shown.shares().tolist(), strict=True):
        printer.add(Step(token, piece, dict(zip(shown.expert_names, row, strict=True))))
    printer.write("\n\n")


def expert_table(shown: Trace) -> Table:
    """A row per expert: its mean share, how often it has the largest one, and the layer with its largest weight."""
    table = Table()
    for name, side in (("expert", "left"), ("mean share", "right"), ("leads", "right"), ("strongest in", "left")):
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    means = shown.shares().mean(0)
    leads = torch.bincount(shown.leading(), minlength=len(means)) / len(shown)
    weights = shown.scalings.mean(0, dtype=torch.float32)  # [layer, expert]
    for number, name in enumerate(shown.expert_names):
        strongest = int(weights[:, number].argmax())
        table.add_row(
            Text(name, style_of(number)),
            f"{means[number]:.1%}",
            f"{leads[number]:.1%}",
            f"{escape(shortened(shown.layer_names[strongest]))} ({weights[strongest, number]:.2f})",
        )
    return table


def data_table(shown: Trace) -> Table:
    """A row per data set: the experts' mean shares, the largest in bold, and the perplexities.

    With more than eight experts, only the three with the largest shares.
    """
    all_of_them = len(shown.expert_names) <= _MOST_COLUMNS
    table = Table(title="mean shares by data set")
    table.add_column("")
    if all_of_them:
        for number, name in enumerate(shown.expert_names):
            table.add_column(name, justify="right", header_style=style_of(number))
    else:
        for name in ("largest", "second", "third"):
            table.add_column(name)
    for name in ("base ppl", "weft ppl"):
        table.add_column(name, justify="right")
    for name, row in shown.by_name().items():
        cells: list[Any]
        if all_of_them:
            cells = [f"[bold]{share:.1%}[/bold]" if share == row.max() else f"{share:.1%}" for share in row]
        else:
            first = row.argsort(descending=True)[:3].tolist()
            cells = [Text(f"{shown.expert_names[one]} {row[one]:.1%}", style_of(one)) for one in first]
        found = shown.only(name).perplexities()
        table.add_row(
            escape(shortened(name)), *cells, *(["–", "–"] if found is None else [f"{found[1]:.2f}", f"{found[0]:.2f}"])
        )
    return table


def comparison_table(traces: list[Trace]) -> Table:
    """A row per trace: mean shares and perplexities."""
    names = list(dict.fromkeys(name for shown in traces for name in shown.expert_names))
    table = Table(title="compared")
    table.add_column("")
    for name in (*names, "tokens", "base ppl", "weft ppl"):
        table.add_column(name, justify="right")
    for number, shown in enumerate(traces, 1):
        means = dict(zip(shown.expert_names, shown.shares().mean(0).tolist(), strict=True))
        cells = [f"{means[name]:.1%}" if name in means else "–" for name in names]
        found = shown.perplexities()
        numbers = ["–", "–"] if found is None else [f"{found[1]:.2f}", f"{found[0]:.2f}"]
        table.add_row(escape(f"{number} {shortened(shown.title)}"), *cells, str(len(shown)), *numbers)
    return table

"""What the numbers of a table suggest, in plain words: `weft eval --advise`. Pure functions over a report.

A row is compared with the mixture by its loss of quality on a data set, with the paired bootstrap interval:

    loss = (value_row - value_weft) / value_weft        for perplexity
    loss = value_weft - value_row                       for accuracy and exact match

Above 0 the row is worse. A loss is *shown* if its interval does not contain 0. A row *will do* if the interval of its
loss ends below 1% on every data set. Where a row cannot be compared (fewer than two examples, or a value that is not
finite), nothing is known: such a row will not do, and no expert is dropped for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from weft.evaluate.report import MIXTURE, Report
from weft.evaluate.rows import Row, only, without

_LITTLE = 0.01  # a loss of quality that does not matter
_STATIC = ("uniform", "merges", "folded")


class Loss(NamedTuple):
    """The loss of quality of a row on a data set, and its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """A shown loss or gain, without its sign."""
        ends = sorted((abs(self.low), abs(self.high)))
        return f"{abs(self.value):.1%} ({ends[0]:.1%} to {ends[1]:.1%})"


def advice(report: Report, rows: Sequence[Row], config: Any, model: str) -> list[str]:
    """What to do with the mixture, a line for each finding.

    Args:
        report: the finished table.
        rows: its rows, without the oracle.
        config: the options of the mixture.
        model: the mixture's folder, for the commands.

    Returns:
        The lines; one that says why there is none, if the mixture could not be compared.
    """
    losses = {row.name: found for row in rows if (found := losses_of(report, row.name))}
    left_out = _left_out(report, [row.name for row in rows if row.name != MIXTURE])
    if not losses:
        return ["none: no row could be compared with the mixture.", *left_out]
    data_sets = list(report.metrics)
    of_group = {
        group: [row.name for row in rows if row.group == group and row.name in losses]
        for group in {r.group for r in rows}
    }
    return [
        *_regrets(losses, of_group, list(config.adapters or {}), model),
        *left_out,
        *_experts(losses, data_sets, list(config.adapters or {}), model),
        *_static(losses, data_sets, [name for group in _STATIC for name in of_group.get(group, ())], config, model),
        *_cheaper(losses, data_sets, of_group, config),
        *_examples(report, losses),
    ]


def losses_of(report: Report, row: str) -> dict[str, Loss]:
    """Data set -> loss of quality of a row, where it can be compared with the mixture."""
    found = {}
    for data, cell in report.cells.get(row, {}).items():
        own = report.cells.get(MIXTURE, {}).get(data)
        if own is None or cell.minus_weft is None:
            continue
        if report.metrics[data] == "perplexity":
            loss = Loss(*((difference / own.value) for difference in (cell.value - own.value, *cell.minus_weft)))
        else:
            loss = Loss(own.value - cell.value, -cell.minus_weft[1], -cell.minus_weft[0])
        if all(map(math.isfinite, loss)):
            found[data] = loss
    return found


def _left_out(report: Report, rows: Sequence[str]) -> list[str]:
    """Why rows could not be compared on a data set, a line for each data set."""
    lines = []
    for data in report.metrics:
        cells = {name: cell for name in (MIXTURE, *rows) if (cell := report.cells.get(name, {}).get(data)) is not None}
        few = [cell.examples for cell in cells.values() if cell.examples < 2]
        wild = [name for name, cell in cells.items() if not math.isfinite(cell.value)]
        if few:
            lines.append(f"{data}: {few[0]} example, nothing can be compared; two or more are needed.")
        elif wild:
            lines.append(f"{data}: the value of {', '.join(wild)} is not finite, and cannot be compared.")
    return lines


def _will_do(losses: dict[str, Loss], data_sets: Sequence[str]) -> bool:
    return all(data in losses and losses[data].high <= _LITTLE for data in data_sets)


def _most(losses: dict[str, Loss]) -> str:
    """The largest loss, in words."""
    data = max(losses, key=lambda name: losses[name].value)
    worst = losses[data].value
    return f"at most {worst:.1%} worse, on {data}" if worst > 0 else "nowhere worse"


def _listed(losses: dict[str, Loss]) -> str:
    return ", ".join(f"{data} by {loss}" for data, loss in losses.items())


def _regrets(
    losses: dict[str, dict[str, Loss]], of_group: dict[str, list[str]], experts: list[str], model: str
) -> list[str]:
    """Data sets on which an expert alone, or the base model, is better than the mixture."""
    alone = [name for name in map(only, experts) if name in losses] + of_group.get("base", [])
    if not alone:
        return []
    data_sets = list(dict.fromkeys(data for name in alone for data in losses[name]))
    lines = []
    for data in data_sets:
        there = {name: losses[name][data] for name in alone if data in losses[name]}
        best = min(there, key=lambda name: there[name].value)
        if there[best].high < 0:
            what = (
                "the base model without experts" if best == "base" else f"the expert {best.removeprefix('only ')} alone"
            )
            lines.append(
                f"{data}: {what} is better by {there[best]}. The gate has not learned such texts: train it further on "
                f"more of them (weft train --start-from {model})."
            )
    better = len(data_sets) - len(lines)
    measured = [name for name in experts if only(name) in losses]
    which = "each expert alone" if measured == experts else f"{', '.join(measured)} alone"
    others = " and ".join([*["the base model"] * ("base" in alone), *[which] * bool(measured)])
    said = f"not worse than {others}, as far as the examples can show"
    return [f"The mixture is {said}, on {better} of {len(data_sets)} data sets.", *lines]


def _experts(losses: dict[str, dict[str, Loss]], data_sets: Sequence[str], experts: list[str], model: str) -> list[str]:
    """Experts that harm, that are not needed, and that the examples do not show to be needed."""
    lines: list[str] = []
    needed: list[str] = []
    unknown: list[str] = []
    for name in experts:
        of_row = losses.get(without(name))
        if of_row is None:
            continue
        harmed = {data: loss for data, loss in of_row.items() if loss.high < 0}
        helped = {data: loss for data, loss in of_row.items() if loss.low > 0}
        drop = f"weft drop-expert {model} {name}"
        if harmed and helped:
            lines.append(
                f"{name} helps on {', '.join(helped)} and harms on {_listed(harmed)}: train the gate further on texts "
                "like the latter."
            )
        elif harmed and not set(data_sets) <= of_row.keys():
            unclear = ", ".join(data for data in data_sets if data not in of_row)
            lines.append(f"{name} harms on {_listed(harmed)}. Whether it is needed on {unclear} is not known.")
        elif harmed:
            lines.append(f"{name} harms: without it, the mixture is better on {_listed(harmed)}. Drop it: {drop}")
        elif _will_do(of_row, data_sets):
            lines.append(f"{name} is redundant: without it, the mixture is {_most(of_row)}. Drop it: {drop}")
        else:
            (needed if helped else unknown).append(name)
    if needed:
        lines.append(f"Needed: {', '.join(needed)}. Without each of them, the mixture is worse on some data set.")
    if unknown:
        lines.append(f"Not shown to be needed, nor to be redundant, by these examples: {', '.join(unknown)}.")
    if sum("Drop it" in line for line in lines) > 1:
        lines.append("Drop one expert at a time, and evaluate again: two that do the same replace each other.")
    return lines


def _static(
    losses: dict[str, dict[str, Loss]], data_sets: Sequence[str], static: list[str], config: Any, model: str
) -> list[str]:
    """Whether weights that do not depend on the token would do."""
    if not static:
        return []
    # The best of those that could be compared on most data sets.
    best = min(static, key=lambda name: (-len(losses[name]), max(loss.high for loss in losses[name].values())))
    of_row = losses[best]
    if not _will_do(of_row, data_sets):
        data = max(of_row, key=lambda name: of_row[name].value)
        if of_row[data].low > 0:
            return [f"Keep the gate: the best static adapter here ({best}) is worse on {data} by {of_row[data]}."]
        return [f"The examples do not show whether a static adapter ({best}) would do."]
    command = ""
    if best == "folded":
        command = f": weft fold {model} --data FILE"
    elif best == "uniform mix" and config.global_scaling_weight:  # by which folding multiplies
        weight = 1 / len(config.adapters) / config.global_scaling_weight
        command = f": weft fold {model} --weights {' '.join(f'{name}={weight:.4g}' for name in config.adapters)}"
    return [f"A static adapter would do: the row {best} is {_most(of_row)}, and every LoRA server loads one{command}"]


def _cheaper(
    losses: dict[str, dict[str, Loss]], data_sets: Sequence[str], of_group: dict[str, list[str]], config: Any
) -> list[str]:
    """Faster ways to run the mixture."""
    lines = []
    kept = [name for name in of_group.get("topk", ()) if name != "weft dense" and _will_do(losses[name], data_sets)]
    if kept:
        number = kept[0].rpartition("-")[2]
        lines.append(
            f"Top-{number} would do: the row {kept[0]} is {_most(losses[kept[0]])}. model.set_topk_lora({number}) "
            "saves time with many experts."
        )
    frozen = [name for name in of_group.get("frozen", ()) if _will_do(losses[name], data_sets)]
    # In texts that are shorter nothing is frozen, and the row is the mixture itself.
    frozen = [name for name in frozen if any(loss != Loss(0, 0, 0) for loss in losses[name].values())]
    if frozen:
        after = frozen[0].rpartition(" ")[2]
        lines.append(
            f"Scalings may be frozen: the row {frozen[0]} is {_most(losses[frozen[0]])}. "
            f"--freeze-scalings-after {after} saves the gate's work in generation."
        )
    if config.gate_layer is None and config.scaling_pass_layers is None:
        lines.append(
            "Scheme: each token takes two complete passes. Train a second mixture with --gate-layer (one pass) or "
            "--scaling-pass-layers (a short first pass), and give it here as --compare short=FOLDER: they are faster. "
            "A short pass was not worse in our measurements; one pass was, by a few percent."
        )
    for name in of_group.get("compare", ()):
        if _will_do(losses[name], data_sets):
            lines.append(f"{name} is {_most(losses[name])}: take the one that is faster or smaller.")
    return lines


def _examples(report: Report, losses: dict[str, dict[str, Loss]]) -> list[str]:
    """How many examples a data set needs to show differences of 1%, where rows are too close to tell."""
    lines = []
    for data in report.metrics:
        close = [of_row[data] for of_row in losses.values() if data in of_row]
        halves = sorted((loss.high - loss.low) / 2 for loss in close if loss.low <= 0 <= loss.high)
        halves = [half for half in halves if half > 0]
        if not halves or halves[len(halves) // 2] <= _LITTLE:
            continue
        half, there = halves[len(halves) // 2], report.cells[MIXTURE][data].examples
        lines.append(
            f"{data}: {there} examples show differences of about {half:.1%}; differences of {_LITTLE:.0%} take about "
            f"{round(there * (half / _LITTLE) ** 2):,} (the interval narrows with the square root of their number)."
        )
    return lines

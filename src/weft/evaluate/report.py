"""The finished table, on a terminal and as JSON, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from weft.errors import ConfigError
from weft.evaluate.data_sets import Metric
from weft.evaluate.rows import ORACLE
from weft.files.ownership import refuse_strangers_file
from weft.files.writing import check_file, replace_file
from weft.options.foreseen import refuse

MIXTURE = "weft"
_UNITS: dict[str, str] = {"perplexity": "perplexity", "accuracy": "accuracy", "exact_match": "exact match"}

_COLUMNS = ["row", "data", "metric", "value", "low", "high", "minus_weft_low", "minus_weft_high"]
_COLUMNS += ["examples", "weight", "seconds", "peak_mb", "note"]
_INTERVALS = "In brackets the 95% bootstrap interval."


@dataclass(frozen=True)
class Measurement:
    """One cell of the table.

    Attributes:
        value: the value of the metric.
        low: lower end of the 95% bootstrap interval; NaN with one example.
        high: upper end of the interval; NaN with one example.
        examples: number of texts or questions.
        weight: number of scored tokens, or of examples.
        seconds: time of the measurement; NaN if it was computed from other cells.
        peak_mb: peak memory in MB; None if it cannot be measured.
        minus_weft: interval of the paired difference to the mixture on the same examples; None without the mixture.
        note: a choice that was made, such as a merge's weights.
    """

    value: float
    low: float
    high: float
    examples: int
    weight: float
    seconds: float
    peak_mb: float | None
    minus_weft: tuple[float, float] | None = None
    note: str = ""


@dataclass
class Report:
    """All results of an evaluation.

    Attributes:
        metrics: data set -> metric.
        cells: row -> data set -> measurement; the rows are in the order of the table.
        impossible: row -> why it could not be measured.
        settings: options on which the results depend.
        same_gate: rows with the mixture's own gate and other settings, which the notes do not compare with it.
        advice: what the numbers suggest, if it was asked for.
    """

    metrics: dict[str, Metric]
    cells: dict[str, dict[str, Measurement]] = field(default_factory=dict)
    impossible: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    same_gate: frozenset[str] = frozenset({MIXTURE})
    advice: list[str] = field(default_factory=list)

    def values(self, metric: str | None = None) -> dict[str, dict[str, float]]:
        """Row -> data set -> value, for one metric or for all."""
        found = {
            row: {data: cell.value for data, cell in cells.items() if metric is None or self.metrics[data] == metric}
            for row, cells in self.cells.items()
        }
        return {row: values for row, values in found.items() if values}

    def best(self) -> dict[str, float]:
        """Data set -> the best finite value, without the oracle, which is given the domains."""
        best = {}
        for data, metric in self.metrics.items():
            values = [cells[data].value for row, cells in self.cells.items() if row != ORACLE and data in cells]
            values = list(filter(math.isfinite, values))
            if values:
                best[data] = min(values) if metric == "perplexity" else max(values)
        return best

    def speed(self, row: str) -> float:
        """Scored tokens per second over all data sets of texts; NaN without such data sets."""
        cells = [cell for data, cell in self.cells[row].items() if self.metrics[data] == "perplexity"]
        seconds = sum(cell.seconds for cell in cells)
        return sum(cell.weight for cell in cells) / seconds if seconds > 0 else math.nan

    def peak(self, row: str) -> float:
        """Peak memory in MB over all data sets; NaN if it cannot be measured."""
        peaks = [cell.peak_mb for cell in self.cells[row].values() if cell.peak_mb is not None]
        return max(peaks, default=math.nan)


def render(report: Report) -> Table:
    """The table for a terminal: values with half the width of their intervals; the best of each data set is bold."""
    with_intervals = any(cell.examples > 1 for cells in report.cells.values() for cell in cells.values())
    shown = Table(title="± half of the 95% interval" if with_intervals else "no interval: each data set is one text")
    shown.add_column("")
    for data, metric in report.metrics.items():
        shown.add_column(f"{data}\n{_UNITS[metric]} {'↓' if metric == 'perplexity' else '↑'}", justify="right")
    shown.add_column("tokens/s", justify="right")
    shown.add_column("peak MB", justify="right")
    best = report.best()
    for row, cells in report.cells.items():
        texts = []
        for data in report.metrics:
            text = _short(cells[data]) if data in cells else "-"
            is_best = data in cells and row != ORACLE and cells[data].value == best.get(data)
            texts.append(f"[bold]{text}[/bold]" if is_best else text)
        shown.add_row(row, *texts, _number(report.speed(row), 0), _number(report.peak(row), 0))
    return shown


def notes(report: Report) -> list[str]:
    """The notes below the table, one line each."""
    by_reason: dict[str, list[str]] = {}
    for row, reason in report.impossible.items():
        by_reason.setdefault(reason, []).append(row)
    lines = [f"{', '.join(rows)}: not possible: {reason}" for reason, rows in by_reason.items()]
    for row, cells in report.cells.items():
        lines += sorted({f"{row}: {cell.note}" for cell in cells.values() if cell.note})
    lines += [line for data in report.metrics for line in _not_finite(report, data)]
    return lines + [line for data in report.metrics for line in _verdict(report, data)]


def _not_finite(report: Report, data: str) -> Iterable[str]:
    """A note for rows whose loss on a data set is not finite, so that they cannot be compared."""
    for kind, is_kind in (("NaN", math.isnan), ("infinite", math.isinf)):
        rows = [row for row, cells in report.cells.items() if data in cells and is_kind(cells[data].value)]
        if rows:
            yield (
                f"{data}: {report.metrics[data].replace('_', ' ')} is {kind} for {', '.join(rows)}: the model gave no "
                "finite numbers, or too large a loss"
            )


def _verdict(report: Report, data: str) -> Iterable[str]:
    """The rows that are better and worse than the mixture on a data set, beyond the uncertainty from its examples."""
    lower = report.metrics[data] == "perplexity"
    better: list[str] = []
    worse: list[str] = []
    open_: list[str] = []
    for row, cells in report.cells.items():
        difference = cells[data].minus_weft if data in cells else None
        if row == ORACLE or row in report.same_gate or difference is None or not math.isfinite(sum(difference)):
            continue
        low, high = difference
        if low <= 0 <= high:
            open_.append(row)
        else:
            (better if (high < 0) == lower else worse).append(row)
    own = report.cells.get(MIXTURE, {}).get(data)
    if own is not None and not math.isfinite(own.value):
        yield f"{data}: nothing can be compared with {MIXTURE}, whose value is not finite"
    elif own is not None and len(report.cells) > 1 and own.examples < 2:
        yield f"{data}: one text, with which nothing can be compared: give more texts"
    elif own is not None and len(report.cells) > 1:
        said = f"better than {MIXTURE}: {', '.join(better) or 'none'}; worse: {', '.join(worse) or 'none'}"
        if open_:
            said += f"; no difference that {own.examples} examples could show: {', '.join(open_)}"
        yield f"{data}: {said}"


def check_outputs(files: list[str]) -> list[Path]:
    """Check the files to write, and return their paths.

    Raises:
        ConfigError: a suffix is unknown, a folder is missing, a file cannot be written, or an existing file is not such
            a table.
    """
    problems = []
    for file in map(Path, files):
        if file.suffix not in _WRITERS:
            problems.append(f"output ({file}) must end in {', '.join(_WRITERS)}")
            continue
        try:
            check_file(file, "output")
            refuse_strangers_file(file, _is_table, "output", "table")
        except ConfigError as err:
            problems.append(str(err))
    refuse(problems)
    return [Path(file) for file in files]


def _is_table(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return {"interval", "minus_weft", "impossible"} <= json.loads(text).keys()
    return _INTERVALS in text if file.suffix == ".md" else text.startswith(",".join(_COLUMNS))


def write(report: Report, file: Path) -> None:
    """Write the table in the format of the file's suffix."""
    text = _WRITERS[file.suffix](report)
    replace_file(file, lambda part: part.write_text(text, encoding="utf-8"))


def as_json(report: Report) -> str:
    """All results; `perplexity`, `accuracy` and `exact_match` are row -> data set -> value, null if not finite."""
    metrics = {
        metric: {
            row: {data: _finite(value) for data, value in values.items()}
            for row, values in report.values(metric).items()
        }
        for metric in _UNITS
        if metric in report.metrics.values()
    }
    first = next(iter(report.cells.values()), {})
    content = {
        **metrics,
        "interval": {row: {d: _pair((c.low, c.high)) for d, c in cells.items()} for row, cells in report.cells.items()},
        "minus_weft": {
            row: {d: _pair(c.minus_weft) for d, c in cells.items() if c.minus_weft}
            for row, cells in report.cells.items()
        },
        "tokens_per_second": {row: _finite(report.speed(row)) for row in report.cells},
        "peak_mb": {row: _finite(report.peak(row)) for row in report.cells},
        "examples": {data: cell.examples for data, cell in first.items()},
        "notes": notes(report),
        **({"advice": report.advice} if report.advice else {}),
        "impossible": report.impossible,
        **report.settings,
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)


def as_markdown(report: Report) -> str:
    """A Markdown table with values and intervals, and the notes."""
    heads = [f"{data} ({_UNITS[metric]})" for data, metric in report.metrics.items()]
    lines = [f"| | {' | '.join(heads)} | tokens/s | peak MB |", "| --- |" + " ---: |" * (len(heads) + 2)]
    best = report.best()
    for row, cells in report.cells.items():
        texts = []
        for data in report.metrics:
            cell = cells.get(data)
            if cell is None:
                texts.append("-")
                continue
            value = _number(cell.value, 2 if report.metrics[data] == "perplexity" else 3)
            value = f"**{value}**" if row != ORACLE and cell.value == best.get(data) else value
            texts.append(value if math.isnan(cell.low) else f"{value} [{cell.low:.3g}, {cell.high:.3g}]")
        name = row.replace("|", "\\|")
        lines.append(
            f"| {name} | {' | '.join(texts)} | {_number(report.speed(row), 0)} | {_number(report.peak(row), 0)} |"
        )
    advice = ["", "Advice:", "", *(f"- {line}" for line in report.advice)] if report.advice else []
    return "\n".join([*lines, "", _INTERVALS, "", *(f"- {n}" for n in notes(report)), *advice]) + "\n"


def as_csv(report: Report) -> str:
    """A CSV file with one line for each row and data set."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row, cells in report.cells.items():
        for data, cell in cells.items():
            numbers = [cell.value, cell.low, cell.high, *(cell.minus_weft or ("", ""))]
            usage = [cell.examples, cell.weight, cell.seconds, "" if cell.peak_mb is None else cell.peak_mb]
            writer.writerow([row, data, report.metrics[data], *numbers, *usage, cell.note])
    for row, reason in report.impossible.items():
        writer.writerow([row, *[""] * 11, f"not possible: {reason}"])
    return out.getvalue()


_WRITERS = {".json": as_json, ".md": as_markdown, ".csv": as_csv}


def _short(cell: Measurement) -> str:
    half = (cell.high - cell.low) / 2
    digits = 2 if cell.value >= 1 else 3
    return f"{cell.value:.{digits}f}" + ("" if math.isnan(half) else f" ±{half:.{digits}f}")


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pair(values: tuple[float, float] | None) -> list[float | None] | None:
    return None if values is None else [_finite(value) for value in values]

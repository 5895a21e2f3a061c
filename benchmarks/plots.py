"""The plots and links of docs/benchmarks.md, from the newest results of each kind (`make plots`).

Each plot carries its numbers, as JSON in its description, by which a test sees whether it shows the newest results,
whatever version of matplotlib drew it. A kind of which there are no results has no plot.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from weft.screen.palette import PALETTE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
# Okabe and Ito's colours, the yellow one left out, which is hard to see on white; with markers of their own.
COLOURS = [PALETTE[place] for place in (4, 5, 2, 0, 6, 1, 7)]
MARKERS = "osD^vPX"
_MADE = re.compile(r"(<!-- made by benchmarks/plots.py -->\n).*(<!-- to here -->\n)", flags=re.S)
_PEFT = "peft X-LoRA 4, uncached"
_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


@dataclass
class Panel:
    """One system of axes.

    Attributes:
        title: What is compared.
        label: Of the axis of values, with the unit.
        rows: Row -> series -> values, of which there is one for each seed.
        intervals: Row -> series -> (low, high).
        log: Whether the axis of values is logarithmic.
        across: Label of the other axis, where the rows are numbers: lines in the place of dots.
    """

    title: str
    label: str
    rows: dict[str, dict[str, list[float]]]
    intervals: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    log: bool = False
    across: str = ""

    def series(self) -> list[str]:
        """The names of all series, in their order."""
        return list(dict.fromkeys(name for values in self.rows.values() for name in values))

    def height(self) -> float:
        """In inches."""
        return 2.4 if self.across else 0.8 + len(self.rows) * (0.12 + 0.08 * len(self.series()))


@dataclass(frozen=True)
class Plot:
    """A kind of results and how it is shown.

    Attributes:
        name: Of the plot's file.
        pattern: Of the results' names after their date.
        title: Of its section.
        text: What was measured, and how to read it.
        panels: From the results' JSON.
    """

    name: str
    pattern: str
    title: str
    text: str
    panels: Callable[[dict[str, Any]], list[Panel]]


def eval_table(result: dict[str, Any]) -> list[Panel]:
    """Perplexities as `weft eval` writes them."""
    rows = {
        row: {data: [value] for data, value in values.items() if value is not None}
        for row, values in result["perplexity"].items()
    }
    intervals = {
        row: {data: pair for data, pair in values.items() if data in rows.get(row, {}) and None not in pair}
        for row, values in result.get("interval", {}).items()
    }
    return [Panel("held-out texts", "perplexity (lower is better)", rows, intervals, log=True)]


def ablation(result: dict[str, Any]) -> list[Panel]:
    """The same for many variants: the column "test" alone, where there is one; a dot for each seed; the best first."""
    (panel,) = eval_table(result)
    shown = ["test"] if "test" in panel.series() else panel.series()
    rows: dict[str, dict[str, list[float]]] = {}
    for row, values in panel.rows.items():
        for data in shown:
            if data in values:
                rows.setdefault(re.sub(r" #\d+$", "", row), {}).setdefault(data, []).extend(values[data])
    title = f"gates trained for {result['steps']} steps"
    return [dataclasses.replace(panel, title=title, rows=_best_first(rows), intervals={})]


def quality(result: dict[str, Any]) -> list[Panel]:
    """Perplexity of each scheme on texts that switch, a dot for each seed."""
    rows = {row: {"mixed": values["mixed"]} for row, values in result["perplexity"].items()}
    title = f"gates trained for {result['steps']} steps"
    return [Panel(title, "perplexity on texts that switch (lower is better)", _best_first(rows), log=True)]


def speed(result: dict[str, Any]) -> list[Panel]:
    """A forward's time beside the others', and how it grows."""
    growth = result["growth"]
    lines = zip(growth["experts"], growth["weft"], growth["line"], strict=True)
    grown = {str(n): {"weft": [ours], "scaling pass + one LoRA of all ranks": [line]} for n, ours, line in lines}
    base = result["forward"]["seconds"]["base"]
    rows = {row: {"forward": [seconds / base]} for row, seconds in result["forward"]["seconds"].items()}
    return [
        Panel("forward of 256 tokens", "time / the base model's", rows),
        Panel("forward of 256 tokens, experts of rank 16", "seconds", grown, across="number of experts"),
    ]


def training(result: dict[str, Any]) -> list[Panel]:
    """A training step's time and memory, with and without gradient checkpointing."""
    names = {"plain": "without checkpointing", "checkpointing": "with gradient checkpointing"}

    def rows(what: str) -> dict[str, dict[str, list[float]]]:
        found: dict[str, dict[str, list[float]]] = {}
        for part, name in names.items():
            for row, value in result.get(part, {}).get(what, {}).items():
                found.setdefault(row, {})[name] = [value]
        return found

    title = "training step of 1 x 512 tokens"
    return [
        Panel(title, "seconds", rows("seconds")),
        Panel(title, "peak memory above the model (MB)", rows("memory_mb")),
    ]


def decoding(result: dict[str, Any]) -> list[Panel]:
    """Tokens per second, for one text and for eight."""
    titles = {"batch 1": "one text", "batch 8": "eight texts at once"}
    panels = {title: {row: {"eager": [speed]} for row, speed in result[key].items()} for key, title in titles.items()}
    if result.get(_PEFT):
        panels["one text"]["peft 4 (no cache)"] = {"eager": [result[_PEFT]]}
    return [Panel(title, "tokens per second (higher is better)", rows) for title, rows in panels.items()]


def compiled(result: dict[str, Any]) -> list[Panel]:
    """The same for one text, beside compiled decoding and mistral.rs."""
    panel, _ = decoding(result)
    for row, values in result.get("compiled", {}).items():
        panel.rows.setdefault(row, {})["compiled"] = [values["tokens_per_s"]]
    for row, key in (("mistral.rs: base", "plain_tokens_per_s"), ("mistral.rs: X-LoRA 4", "xlora_tokens_per_s")):
        if key in result.get("mistral.rs", {}):
            panel.rows[row] = {"compiled": [result["mistral.rs"][key]]}
    return [panel]


def speculation(result: dict[str, Any]) -> list[Panel]:
    """How much sooner guessing ahead gives the same text."""
    rows = {
        kind: {"median": [values["speedup"]], "slowest prompt": [values["slowest"]]}
        for kind, values in result["kinds"].items()
    }
    return [Panel("speculate=8, the same text", "speed-up over plain decoding (1: none)", rows)]


KINDS = [
    Plot(
        "demo",
        r"demo",
        "The demo: the mixture and its experts",
        "`make demo`: four experts and a gate on SmolLM2-135M; perplexity on held-out texts of each domain and on "
        "texts that switch between them (mixed), with 95% bootstrap intervals. The oracle is told the domains.",
        eval_table,
    ),
    Plot(
        "quality",
        r"quality-\d+-steps",
        "Quality of the cheaper schemes",
        "The demo's data and experts, one gate for each scheme ([the schemes](generation.md#the-schemes)). A dot for "
        "each seed.",
        quality,
    ),
    Plot(
        "ablation",
        r"ablation-\d+-steps",
        "What makes a good gate",
        "Variants of the demo's gate with one change each, beside static merges, Arrow and single LoRAs of the gate's "
        "size. Perplexity on texts that were not used to choose anything; a dot for each seed "
        "([evaluate](evaluate.md#the-rows)).",
        ablation,
    ),
    Plot(
        "speed",
        r"speed",
        "Speed of a forward",
        "SmolLM2-135M in float32, experts of rank 16 on all projections, all in turns in one process. Medians.",
        speed,
    ),
    Plot(
        "training",
        r"training",
        "A training step",
        "The same model; only the gate is trained. *cached*: the scaling pass was read from disk "
        "([cheaper training](lean.md)).",
        training,
    ),
    Plot(
        "decode-eager",
        r"decode-eager",
        "Decoding",
        "Greedy, after a prompt of 128 tokens, with a cache, except for peft, which has none.",
        decoding,
    ),
    Plot(
        "decode",
        r"decode",
        "Decoding, compiled, and mistral.rs",
        "A separate run: `torch.compile` with a static cache, eager decoding, and mistral.rs.",
        compiled,
    ),
    Plot(
        "speculation",
        r"speculation",
        "Speculative decoding",
        "The demo's mixture with and without `speculate=8` "
        "([speculative decoding](generation.md#speculative-decoding)).",
        speculation,
    ),
]


def newest(pattern: str, results: Path = RESULTS) -> Path | None:
    """The latest results of a kind; of one day, those with the larger number (of steps) in their name."""
    kind = re.compile(rf"(\d{{4}}-\d\d-\d\d)-{pattern}\.json")
    files = [file for file in results.glob("*.json") if kind.fullmatch(file.name)]
    return max(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)], default=None)


def found(results: Path = RESULTS) -> Iterator[tuple[Plot, Path, dict[str, Any]]]:
    """Each plot for which there are results: (plot, their file, their content)."""
    for plot in KINDS:
        file = newest(plot.pattern, results)
        if file is not None:
            yield plot, file, json.loads(file.read_text("utf-8"))


def series(plot: Plot, file: Path, result: dict[str, Any]) -> str:
    """All that a plot shows, as the text that it carries."""
    panels = [dataclasses.asdict(panel) for panel in plot.panels(result)]
    return json.dumps({"source": file.name, "panels": panels}, sort_keys=True)


def carried(svg: Path) -> str | None:
    """What `series` said when a plot was drawn."""
    return ElementTree.parse(svg).findtext(f".//{_DESCRIPTION}")


def sections(results: Path = RESULTS) -> str:
    """The part of the page that is made of the results."""
    parts = []
    for plot, file, result in found(results):
        links = [
            f"[{at.name}](../benchmarks/results/{at.name})" for at in (file, file.with_suffix(".md")) if at.exists()
        ]
        text = textwrap.fill(plot.text, 120, break_long_words=False, break_on_hyphens=False)
        parts.append(f"\n## {plot.title}\n\n{text}\n\n![{plot.title}](plots/{plot.name}.svg)\n\n")
        parts.append("Numbers: " + ",\n".join(links) + f"{_where(result)}.\n")
    return "".join(parts) + "\n"


def page(text: str, results: Path = RESULTS) -> str:
    """The page with its made part as the results have it."""
    return _MADE.sub(lambda match: match[1] + sections(results) + match[2], text)


def draw(plot: Plot, file: Path, result: dict[str, Any], output: Path) -> None:
    """Write a plot as SVG: the same bytes from the same numbers, by the same matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = plot.panels(result)
    heights = [panel.height() for panel in panels]
    with mpl.rc_context({"svg.hashsalt": "weft", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        # White behind it, so that it can be read on dark pages too.
        figure = Figure(figsize=(7.5, sum(heights)), layout="constrained", facecolor="white")
        axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
        for panel, axis in zip(panels, axes, strict=True):
            (_lines if panel.across else _dots)(panel, axis)
            axis.set_title(panel.title, fontsize=9, loc="left")
            axis.grid(color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            if len(panel.series()) > 1:
                axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        output.parent.mkdir(exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": series(plot, file, result)}
        figure.savefig(output, format="svg", metadata=metadata)
    # matplotlib ends lines with spaces, which `git diff --check` does not like.
    output.write_text(re.sub(r" +$", "", output.read_text("utf-8"), flags=re.M), "utf-8")


def main() -> None:
    """Draw every plot for which there are results, and bring the page up to date."""
    PLOTS.mkdir(exist_ok=True)
    made = set()
    for plot, file, result in found():
        output = PLOTS / f"{plot.name}.svg"
        draw(plot, file, result, output)
        made.add(output)
        print(f"{output.relative_to(ROOT)}  from  {file.name}")
    for old in set(PLOTS.glob("*.svg")) - made:
        old.unlink()
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")


def _best_first(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    return dict(sorted(rows.items(), key=lambda item: statistics.mean(list(item[1].values())[-1])))


def _where(result: dict[str, Any]) -> str:
    setting = result.get("setting", {})
    said = [setting.get("cpu"), f"{setting['threads']} threads" if "threads" in setting else None]
    return "".join(f"; {part}" for part in said if part)


def _dots(panel: Panel, axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    names = panel.series()
    for number, name in enumerate(names):
        height = ((len(names) - 1) / 2 - number) * min(0.2, 0.7 / len(names))
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": ""}
        points = [
            (value, place - height)
            for place, values in enumerate(panel.rows.values())
            for value in values.get(name, [])
        ]
        axis.plot(*zip(*points, strict=True), markersize=4, label=name, **style)
        for place, row in enumerate(panel.rows):
            low_high = panel.intervals.get(row, {}).get(name)
            if low_high is not None:
                axis.plot(low_high, [place - height] * 2, color=style["color"], linewidth=0.9)
    axis.set_yticks(range(len(panel.rows)), list(panel.rows))
    axis.set_ylim(len(panel.rows) - 0.4, -0.6)
    axis.set_xlabel(panel.label)
    if panel.log:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_xlim(left=0)


def _lines(panel: Panel, axis: Any) -> None:
    numbers = [int(row) for row in panel.rows]
    for number, name in enumerate(panel.series()):
        values = [statistics.mean(series[name]) for series in panel.rows.values()]
        axis.plot(numbers, values, color=COLOURS[number], marker=MARKERS[number], markersize=4, label=name)
    axis.set_xticks(numbers)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(panel.across)
    axis.set_ylabel(panel.label)


if __name__ == "__main__":
    main()

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from plot_kinds import KINDS, Panel, Plot
from weft.screen.palette import PALETTE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
PLOTS = ROOT / "docs" / "plots"
# Okabe and Ito's colours, the yellow one left out, which is hard to see on white; with markers of their own.
COLOURS = [PALETTE[place] for place in (4, 5, 2, 0, 6, 1, 7)]
MARKERS = "osD^vPX"
_MADE = re.compile(r"(<!-- made by benchmarks/plots.py -->\n).*(<!-- to here -->\n)", flags=re.S)
_DESCRIPTION = "{http://purl.org/dc/elements/1.1/}description"


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

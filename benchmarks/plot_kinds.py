"""What the plots of docs/benchmarks.md and docs/quality.md show: a kind of results, and their rows and series."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_PEFT = "peft X-LoRA 4, uncached"


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


def domains(result: dict[str, Any]) -> list[Panel]:
    """Perplexities relative to the oracle's (on domains without an expert, to the base's), for each number of experts.

    Of the experts alone only the best on mixed texts is shown.
    """
    series = {"mixed texts / oracle": "mixed / own", "single domains / oracle": "domains / own"}
    series["unseen domains / base"] = "unseen / base"
    panels = []
    for size, table in result["sizes"].items():
        by_mixed = sorted((row for row in table if table[row]["mixed"]), key=lambda row: table[row]["mixed"])
        alone = [row for row in by_mixed if row.startswith("only ")]
        shown = [row for row in by_mixed if row not in alone[1:]]
        rows: dict[str, dict[str, list[float]]] = {}
        intervals: dict[str, dict[str, list[float]]] = {}
        for row in shown:
            values = {name: table[row][key] for name, key in series.items() if table[row][key]}
            rows[row] = {name: [value] for name, (value, _, _) in values.items()}
            intervals[row] = {name: [low, high] for name, (_, low, high) in values.items()}
        panels.append(Panel(f"{size} experts", "ratio of perplexities (lower is better)", rows, intervals, log=True))
    return panels


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
        "domains",
        r"domains",
        "Domains of real text",
        "Gates over experts of the bench of 32 domains, and what they are compared with: ratios of perplexities, with "
        "95% bootstrap intervals. *own expert* is the oracle, each passage by its own domain's expert; *only ...* is "
        "the best single expert ([how good is it?](quality.md)).",
        domains,
    ),
    Plot(
        "domains-gemma-3-270m",
        r"domains-gemma-3-270m",
        "Domains of real text, on Gemma 3 270M",
        "The same bench on another base model, with a vocabulary of 262,144 tokens and a sliding window.",
        domains,
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


def _best_first(rows: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, list[float]]]:
    return dict(sorted(rows.items(), key=lambda item: statistics.mean(list(item[1].values())[-1])))

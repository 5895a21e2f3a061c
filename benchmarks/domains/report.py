"""The tables of the bench of many experts, from the scores that bench.py has kept; writes `results/DATE-domains.*`, or
`DATE-domains-MODEL.*`.

Every number is a ratio of perplexities, with the interval that holds 95% of 1,000 bootstrap samples of the texts: the
same samples for both, so that what is hard for both cancels. "own expert" is the oracle: of a text of one domain its
expert, of mixed texts each passage's. Means over domains are geometric, and every domain counts the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from base_models import MODELS, SMOLLM2, runs, suffix
from composition import SETS
from table import SIZES
from work import NAMES, ROOT, TEXTS, UNSEEN, read_rows

sys.path.insert(0, str(ROOT / "benchmarks"))
from harness import save, setting

RESAMPLES = 1000
# Scores of a row on a data set: [example, (sum of losses, tokens)].
Scores = np.ndarray
Rows = dict[str, dict[str, Scores]]


def main() -> None:
    """Write the tables of all sizes that are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default=SMOLLM2, help="the base model")
    parser.add_argument("--work", type=Path, help="where bench.py has kept its tables")
    parser.add_argument("--texts", type=Path, default=TEXTS)
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--about", default="", help="how and where it was run")
    arguments = parser.parse_args()
    tables = (arguments.work or runs(arguments.model)) / "tables"
    found: dict[str, Any] = {}
    of_sizes: dict[int, Rows] = {}
    text = f"{arguments.about}\n\n" if arguments.about else ""
    for size in SIZES:
        rows = read(tables, size, arguments.texts)
        if "own expert" in rows and "base" in rows:
            of_sizes[size] = rows
            found[str(size)] = {name: compared(rows, name, size) for name in rows}
            text += table(found[str(size)], size)
    result = {"setting": setting(), "sizes": found, "grown": grown(of_sizes)}
    text += grown_table(result["grown"])
    for name in SETS:
        if rows := exact_matches(tables, name):
            result[name] = rows
            text += composed_table(rows, name)
    if arguments.print:
        print(text)
    else:
        save(f"domains{suffix(arguments.model)}", result, text)


def read(folder: Path, size: int, texts: Path) -> Rows:
    """Row -> data set -> scores, of all tables of a size."""
    parts: Rows = {}
    for file in sorted(folder.glob(f"{size}-*.cells.jsonl")):
        gate = file.name.removesuffix(".cells.jsonl").removeprefix(f"{size}-")
        for cell in read_rows(file):
            name = cell["row"].replace("weft", gate) if cell["row"].startswith("weft") else cell["row"]
            parts.setdefault(name, {})[cell["data"]] = np.array(cell["cell"]["scores"])
    if not parts:
        return {}
    labels = [[name for _, name in row["experts"]] for row in read_rows(texts / f"mixed-{size}" / "test.jsonl")]
    flat = [label for of_text in labels for label in of_text]
    alone = {name: parts[f"only {name}"] for name in NAMES[:size] if f"only {name}" in parts}
    if len(alone) == size:
        mixed = len(next(iter(alone.values()))["mixed"])
        own = np.array([alone[label]["mixed"][place] for place, label in enumerate(flat[:mixed])])
        parts["own expert"] = {"mixed": own, **{name: alone[name][name] for name in alone}}
    starts = np.cumsum([0, *(len(of_text) for of_text in labels)])
    for of in parts.values():
        of["mixed"] = np.add.reduceat(of["mixed"], starts[starts < len(of["mixed"])])
    return {name: of for name, of in parts.items() if not name.startswith("only ") or len(of) > len(alone)}


def samples(scores: Scores, seed: int = 0) -> np.ndarray:
    """Mean loss per token: of all texts, then of each bootstrap sample of them, [1 + sample]."""
    number = len(scores)
    counts = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=RESAMPLES)
    sums = np.vstack([scores.sum(0), counts @ scores])
    return sums[:, 0] / sums[:, 1]


def ratio(one: list[Scores], other: list[Scores]) -> tuple[float, float, float]:
    """A geometric mean over data sets of ratios of perplexities, and the ends of its interval."""
    pairs = zip(one, other, strict=True)
    logs = np.mean([samples(ours, seed) - samples(theirs, seed) for seed, (ours, theirs) in enumerate(pairs)], axis=0)
    low, high = np.quantile(logs[1:], [0.025, 0.975])
    return float(np.exp(logs[0])), float(np.exp(low)), float(np.exp(high))


def compared(rows: Rows, name: str, size: int) -> dict[str, Any]:
    """A row beside own experts, the base and the best single expert; None where it was not measured."""
    own, row = rows["own expert"], rows[name]
    domains = [domain for domain in NAMES[:size] if domain in row]
    unseen = [f"unseen-{domain}" for domain in UNSEEN if f"unseen-{domain}" in row]
    each = {domain: ratio([row[domain]], [own[domain]]) for domain in domains}
    return {
        "mixed": float(np.exp(samples(row["mixed"])[0])) if "mixed" in row else None,
        "mixed / own": ratio([row["mixed"]], [own["mixed"]]) if "mixed" in row and "mixed" in own else None,
        "domains / own": ratio(*([of[domain] for domain in domains] for of in (row, own))) if domains else None,
        "each / own": each,
        "unseen / base": ratio([row[one] for one in unseen], [rows["base"][one] for one in unseen]) if unseen else None,
        "each unseen / base": {one: ratio([row[one]], [rows["base"][one]]) for one in unseen},
    }


def grown(of_sizes: dict[int, Rows]) -> list[dict[str, Any]]:
    """What more experts cost: a row at two sizes, on the domains of the smaller one."""
    pairs = [(few, many) for few in of_sizes for many in of_sizes if few < many]
    return [
        {
            "row": name,
            "from": few,
            "to": many,
            "ratio": ratio(
                *([of_sizes[size][name][domain] for domain in NAMES[:few]] for size in (many, few)),
            ),
        }
        for few, many in pairs
        for name in of_sizes[few].keys() & of_sizes[many].keys() - {"own expert", "base"}
        if all(domain in of_sizes[size][name] for size in (few, many) for domain in NAMES[:few])
    ]


def grown_table(found: list[dict[str, Any]]) -> str:
    """Markdown, a line for each row and pair of sizes."""
    lines = ["## More experts, the same domains", "", "| | experts | perplexity |", "| --- | --- | --- |"]
    for of in sorted(found, key=lambda of: (of["row"], of["from"], of["to"])):
        lines.append(f"| {of['row']} | {of['from']} to {of['to']} | {shown(of['ratio'])} |")
    return "\n".join(lines) + "\n\n" if found else ""


def table(found: dict[str, Any], size: int) -> str:
    """Markdown, the best on mixed texts first."""
    lines = [
        f"## {size} experts",
        "",
        "| | mixed texts: perplexity | / own experts | single domains: mean / own expert | worst | at most 1% worse | "
        "unseen domains: mean / base | worst |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted(found, key=lambda name: found[name]["mixed"] or float("inf")):
        of = found[name]
        each, unseen = of["each / own"], of["each unseen / base"]
        worst = max(each, key=lambda domain: each[domain][0]) if each else None
        hardest = max(unseen, key=lambda domain: unseen[domain][0]) if unseen else None
        within = sum(value[0] <= 1.01 for value in each.values())
        cells = [
            f"{of['mixed']:.3f}" if of["mixed"] else "",
            shown(of["mixed / own"]),
            shown(of["domains / own"]),
            f"{each[worst][0]:.3f} ({worst})" if worst else "",
            f"{within} of {len(each)}" if each else "",
            shown(of["unseen / base"]),
            f"{unseen[hardest][0]:.3f} ({hardest.removeprefix('unseen-')})" if hardest else "",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def exact_matches(folder: Path, name: str) -> dict[str, Any]:
    """Row -> data set -> exact matches and the ends of their interval, of texts that need two experts at once."""
    rows: dict[str, Any] = {}
    for task in ("seen", "unseen"):
        file = folder / f"{name}-{task}.json"
        of = json.loads(file.read_text("utf-8")) if file.exists() else {"exact_match": {}}
        for row, values in of["exact_match"].items():
            named = f"weft, task {task}" if row == "weft" else row
            rows[named] = {data: (value, *of["interval"][row][data]) for data, value in values.items()}
    return rows


def composed_table(rows: dict[str, Any], name: str) -> str:
    """Markdown, the best first."""
    sets = list(next(iter(rows.values())))
    lines = [f"## Two experts at once: {name}, exact match", "", f"| | {' | '.join(sets)} |", "| --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: -sum(value[0] for value in rows[row].values())):
        cells = [f"{value:.2f} ({low:.2f} to {high:.2f})" for value, low, high in rows[row].values()]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n"


def shown(value: tuple[float, float, float] | None) -> str:
    """A ratio and its interval."""
    return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})" if value else ""


if __name__ == "__main__":
    main()

"""The plots of the benchmarks page show the newest results; what they show is in them as text."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
plots = importlib.import_module("plots")
plot_kinds = importlib.import_module("plot_kinds")

FOUND = list(plots.found())


@pytest.mark.parametrize(("plot", "file", "result"), FOUND, ids=[plot.name for plot, *_ in FOUND])
def test_a_plot_shows_the_newest_results(plot, file, result):
    carried = plots.carried(plots.PLOTS / f"{plot.name}.svg")
    assert json.loads(carried) == json.loads(plots.series(plot, file, result)), "run `make plots`"


def test_the_page_has_every_plot_and_no_other():
    text = plots.PAGE.read_text()
    assert plots.page(text) == text, "run `make plots`"
    assert {file.stem for file in plots.PLOTS.iterdir()} == {plot.name for plot, *_ in FOUND}


def test_the_newest_of_one_day_has_the_most_steps(tmp_path):
    for name in ("2026-01-02-quality-96-steps", "2026-01-02-quality-480-steps", "2025-12-30-quality-960-steps"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert plots.newest(r"quality-\d+-steps", tmp_path).stem == "2026-01-02-quality-480-steps"
    assert plots.newest("quality", tmp_path) is None


def test_a_kind_without_results_has_no_section(tmp_path):
    assert plots.sections(tmp_path) == "\n"
    (tmp_path / "2026-01-01-speculation.json").write_text(json.dumps({"kinds": {}}))
    assert plots.sections(tmp_path).count("\n## ") == 1


def test_an_ablation_shows_its_seeds_on_other_texts_than_those_chosen_by(tmp_path):
    table = {
        f"{row} #{seed}": {"select": 9.0, "test": value + seed}
        for row, value in {"a": 20, "b": 10}.items()
        for seed in (0, 1)
    }
    result = {"steps": 1, "perplexity": table, "interval": {"a #0": {"test": [19.0, None]}}}
    (panel,) = plot_kinds.ablation(result)
    assert panel.rows == {"b": {"test": [10, 11]}, "a": {"test": [20, 21]}}
    plot = next(plot for plot in plots.KINDS if plot.name == "ablation")
    file = tmp_path / "2026-01-01-ablation-1-steps.json"
    for name in ("one.svg", "two.svg"):
        plots.draw(plot, file, result, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert plots.carried(tmp_path / "one.svg") == plots.series(plot, file, result)

"""`weft eval --advise`: what the numbers of a table suggest."""

import json
from types import SimpleNamespace

import pytest

import weft
from models import let_the_gate_decide
from weft.cli import main
from weft.evaluate import evaluate
from weft.evaluate.advice import Loss, advice, losses_of
from weft.evaluate.contestants import base_alone
from weft.evaluate.report import Measurement, Report
from weft.evaluate.rows import Row
from weft.options import EvalOptions

GROUPS = {
    "base": "base",
    "uniform mix": "uniform",
    "folded": "folded",
    "weft top-2": "topk",
    "weft frozen after 32": "frozen",
}
ADAPTERS = {"math": "m", "code": "c"}
TWO_PASSES = SimpleNamespace(adapters=ADAPTERS, global_scaling_weight=2.0, gate_layer=None, scaling_pass_layers=None)
ONE_PASS = SimpleNamespace(adapters=ADAPTERS, global_scaling_weight=2.0, gate_layer=4, scaling_pass_layers=None)


def group_of(name):
    return GROUPS.get(name) or {"only": "experts", "without": "without"}.get(name.split()[0], "compare")


def advised(config=ONE_PASS, metric="perplexity", **of_rows):
    """The advice for rows, each with (low, high) of its loss of quality on each data set, in percent."""
    own = 10.0 if metric == "perplexity" else 0.5
    sign, unit = (1, own / 100) if metric == "perplexity" else (-1, 1 / 100)
    data_sets = [f"data{number}" for number in range(max(len(losses) for losses in of_rows.values()))]
    cells = {"weft": {data: Measurement(own, own, own, 16, 100.0, 1.0, None) for data in data_sets}}
    for row, losses in of_rows.items():
        cells[row.replace("_", " ")] = {
            data: Measurement(
                own + sign * unit * (low + high) / 2,
                0.0,
                1.0,
                16,
                100.0,
                1.0,
                None,
                tuple(sorted((sign * low * unit, sign * high * unit))),
            )
            for data, (low, high) in zip(data_sets, losses, strict=True)
        }
    report = Report(dict.fromkeys(data_sets, metric), cells)
    rows = [Row(name, "weft" if name == "weft" else group_of(name), base_alone()) for name in cells]
    return advice(report, rows, config, "mine")


def test_a_loss_is_relative_for_perplexities_and_a_difference_for_shares():
    for metric, own, other in (("perplexity", 10.0, 11.0), ("accuracy", 0.5, 0.4)):
        difference = (0.5, 1.5) if metric == "perplexity" else (-0.15, -0.05)
        cells = {
            "weft": {"law": Measurement(own, own, own, 8, 1.0, 1.0, None)},
            "base": {"law": Measurement(other, other, other, 8, 1.0, 1.0, None, difference)},
        }
        assert losses_of(Report({"law": metric}, cells), "base")["law"] == pytest.approx(Loss(0.1, 0.05, 0.15))


@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_experts_that_harm_are_redundant_or_needed_are_named(metric):
    lines = advised(
        metric=metric,
        without_math=[(-4, -2), (-0.5, 0.5)],
        without_code=[(-0.4, 0.6), (0.0, 0.8)],
        base=[(0.5, 2), (1, 2)],
    )
    assert lines[:4] == [
        "The mixture is not worse than the base model, as far as the examples can show, on 2 of 2 data sets.",
        "math harms: without it, the mixture is better on data0 by 3.0% (2.0% to 4.0%). Drop it: weft drop-expert mine "
        "math",
        "code is redundant: without it, the mixture is at most 0.4% worse, on data1. Drop it: weft drop-expert mine "
        "code",
        "Drop one expert at a time, and evaluate again: two that do the same replace each other.",
    ]
    lines = advised(metric=metric, without_math=[(-4, -2), (2, 4)], without_code=[(1, 3), (-2, 2)])
    assert lines[:2] == [
        "math helps on data1 and harms on data0 by 3.0% (2.0% to 4.0%): train the gate further on texts like the "
        "latter.",
        "Needed: code. Without each of them, the mixture is worse on some data set.",
    ]
    assert "Not shown to be needed, nor to be redundant, by these examples: code." in advised(without_code=[(-3, 3)])


def test_data_on_which_something_simpler_is_better_are_named():
    lines = advised(base=[(5, 9), (-3, -1)], only_math=[(-5, -3), (1, 3)], only_code=[(2, 4), (-0.5, 0.5)])
    assert lines[0] == (
        "The mixture is not worse than the base model and each expert alone, as far as the examples can show, on 0 of "
        "2 data sets."
    )
    assert lines[1].startswith(
        "data0: the expert math alone is better by 4.0% (3.0% to 5.0%). The gate has not learned"
    )
    assert lines[1].endswith("(weft train --start-from mine).")
    assert lines[2].startswith("data1: the base model without experts is better by 2.0% (1.0% to 3.0%).")


def test_whether_a_static_adapter_would_do():
    would = advised(uniform_mix=[(0.1, 0.9), (5, 7)], folded=[(-0.2, 0.6), (0, 0.8)])
    assert would[0] == (
        "A static adapter would do: the row folded is at most 0.4% worse, on data1, and every LoRA server loads one: "
        "weft fold mine --data FILE"
    )
    would = advised(uniform_mix=[(-2, -1)], folded=[(4, 6)])
    assert would[0].endswith("every LoRA server loads one: weft fold mine --weights math=0.25 code=0.25")
    keep = advised(uniform_mix=[(9, 11)], folded=[(4, 6)])
    assert keep[0] == "Keep the gate: the best static adapter here (folded) is worse on data0 by 5.0% (4.0% to 6.0%)."
    assert advised(folded=[(-3, 5)])[0] == "The examples do not show whether a static adapter (folded) would do."


def test_what_is_cheaper_and_will_do():
    lines = advised(
        TWO_PASSES, **{"weft top-2": [(-0.5, 0.5)], "weft frozen after 32": [(0, 0.4)], "one_pass": [(-2, -1)]}
    )
    assert lines[0].startswith("Top-2 would do: the row weft top-2 is nowhere worse. model.set_topk_lora(2)")
    assert lines[1].startswith("Scalings may be frozen: the row weft frozen after 32 is at most 0.2% worse, on data0.")
    assert "--freeze-scalings-after 32" in lines[1]
    assert lines[2].startswith("Scheme: each token takes two complete passes.")
    assert lines[3] == "one pass is nowhere worse: take the one that is faster or smaller."
    assert advised(ONE_PASS, **{"weft top-2": [(0.5, 2.5)], "weft frozen after 32": [(3, 4)]}) == []


def test_how_many_examples_would_show_one_percent():
    assert advised(without_code=[(-3, 1), (-0.5, 0.5)])[-1] == (
        "data0: 16 examples show differences of about 2.0%; differences of 1% take about 64 (the interval narrows with "
        "the square root of their number)."
    )


def test_rows_that_are_clearly_worse_do_not_ask_for_more_examples():
    assert "data0: 16 examples" in advised(only_math=[(90, 900)], only_code=[(-2, 2)])[-1]
    assert not [line for line in advised(only_math=[(90, 900)]) if "examples show" in line]


def test_a_mixture_that_is_not_compared_gets_no_advice():
    cell = Measurement(10.0, float("nan"), float("nan"), 1, 100.0, 1.0, None)
    report = Report({"law": "perplexity"}, {"weft": {"law": cell}, "base": {"law": cell}})
    rows = [Row("base", "base", base_alone()), Row("weft", "weft", base_alone())]
    assert advice(report, rows, ONE_PASS, "mine") == [
        "none: no row could be compared with the mixture.",
        "law: 1 example, nothing can be compared; two or more are needed.",
    ]


def test_only_rows_that_were_measured_are_named():
    assert advised(only_math=[(2, 4)])[0].startswith("The mixture is not worse than math alone, as far as")
    assert advised(base=[(2, 4)])[0].startswith("The mixture is not worse than the base model, as far as")


@pytest.mark.parametrize("kind", ["one example", "not finite"])
def test_nothing_is_said_to_be_dispensable_that_a_data_set_without_a_comparison_may_need(kind):
    own = Measurement(10.0, 9.0, 11.0, 16, 100.0, 1.0, None)
    lower = Measurement(9.0, 8.0, 10.0, 16, 100.0, 1.0, None, (-1.5, -0.5))
    same = Measurement(10.0, 9.0, 11.0, 16, 100.0, 1.0, None, (-0.01, 0.01))
    one = Measurement(137.0, float("nan"), float("nan"), 1, 9.0, 1.0, None)
    worse = Measurement(252.0, float("nan"), float("nan"), 1, 9.0, 1.0, None)
    if kind == "not finite":
        one = Measurement(137.0, 130.0, 140.0, 16, 9.0, 1.0, None)
        worse = Measurement(float("inf"), float("nan"), float("nan"), 16, 9.0, 1.0, None)
    cells = {
        "weft": {"a": own, "b": one},
        "without math": {"a": lower, "b": worse},
        "without code": {"a": same, "b": worse},
        "folded": {"a": same, "b": worse},
        "weft top-2": {"a": same, "b": worse},
    }
    report = Report(dict.fromkeys("ab", "perplexity"), cells)
    rows = [Row(name, "weft" if name == "weft" else group_of(name), base_alone()) for name in cells]
    said = "b: 1 example, nothing can be compared; two or more are needed."
    if kind == "not finite":
        said = "b: the value of without math, without code, folded, weft top-2 is not finite, and cannot be compared."
    assert advice(report, rows, ONE_PASS, "mine") == [
        said,
        "math harms on a by 10.0% (5.0% to 15.0%). Whether it is needed on b is not known.",
        "Not shown to be needed, nor to be redundant, by these examples: code.",
        "The examples do not show whether a static adapter (folded) would do.",
    ]


def test_a_row_in_which_nothing_was_frozen_is_no_advice():
    assert advised(ONE_PASS, **{"weft frozen after 32": [(0, 0)]}) == []


@pytest.fixture
def law(tmp_path):
    texts = ["the quick brown fox jumps", "over the lazy dog", "a mathematician proves it", "code that nobody reads"]
    file = tmp_path / "law.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(file)


def test_its_rows_are_the_mixture_without_an_expert_and_the_folded_one(mixture, law, tmp_path, capsys):
    let_the_gate_decide(mixture)
    output = tmp_path / "table.json"
    command = ["eval", mixture, "--data", f"law={law}", "--rows", "base", "--advise", "--output", str(output)]
    assert main([*command, str(tmp_path / "table.md")]) == 0
    found = json.loads(output.read_text())
    assert list(found["perplexity"]) == ["base", "weft", "folded", "without math", "without code"]
    assert found["advice"]
    assert found["advice"][0] in " ".join((tmp_path / "table.md").read_text().split("\n- "))
    assert "Advice:" in capsys.readouterr().out

    # The same by the commands that the advice names.
    for name in ("math", "code"):
        without = weft.drop_expert(mixture, name, tmp_path / f"without-{name}")
        alone = evaluate(EvalOptions(model=str(without), data=[f"law={law}"], rows=["weft"]))
        assert alone["weft"]["law"] == found["perplexity"][f"without {name}"]["law"]
    assert main(["fold", mixture, "--data", law, "--output", str(tmp_path / "folded")]) == 0
    options = EvalOptions(model=mixture, data=[f"law={law}"], rows=["one"], compare=[f"one={tmp_path / 'folded'}"])
    assert evaluate(options)["one"]["law"] == pytest.approx(found["perplexity"]["folded"]["law"], rel=1e-5)


def test_without_it_and_without_their_names_these_rows_are_not_measured(mixture, law):
    found = evaluate(EvalOptions(model=mixture, data=[f"law={law}"]))
    assert not {"folded", "without math", "without code"} & found.keys()
    found = evaluate(EvalOptions(model=mixture, data=[f"law={law}"], rows=["without"]))
    assert list(found) == ["without math", "without code"]


def test_what_cannot_be_dropped_is_said(base_folder, base_adapters, law, tmp_path, capsys):
    torch_model = weft.from_adapters(base_folder, base_adapters, top_k_lora=2)
    torch_model.save_pretrained(tmp_path / "mixture")
    assert main(["eval", str(tmp_path / "mixture"), "--data", f"law={law}", "--rows", "without"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "without math, without code: not possible: top_k_lora (2) must be at most" in said

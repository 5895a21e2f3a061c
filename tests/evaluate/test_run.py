"""`weft eval` from the command line: opponents, the oracle, resuming, and the files it writes."""

import csv
import io
import json
import math
import re

import pytest
import torch
import transformers

import weft
import weft.evaluate.run as evaluation
from disk import full_disk
from models import let_the_gate_decide, lora, quietly, save_adapter
from weft.cli import main
from weft.errors import AdapterError, CheckpointError
from weft.evaluate import evaluate, perplexity
from weft.evaluate.cell_store import Cell, CellStore
from weft.evaluate.contestants import SharedBase, adapters, arrow, mixture
from weft.evaluate.merges import MERGES, Merge, merged
from weft.evaluate.report import Measurement, Report, notes, render
from weft.options import EvalOptions
from weft.screen.console import VisibleConsole

SENTENCES = ["the quick brown fox jumps", "over the lazy dog", "a mathematician proves it", "code that nobody reads"]


@pytest.fixture
def data(tmp_path):
    """Data sets of every kind, as `--data` takes them."""
    rows = {
        "math": [{"text": text} for text in SENTENCES],
        "mixed": [{"text": text, "experts": [[0, "math"], [6, "code"]]} for text in SENTENCES],
        "unlabelled": [{"text": text} for text in SENTENCES],
        "choice": [
            {"question": text, "choices": ["yes", "perhaps"], "answer": 1, "expert": "code"} for text in SENTENCES
        ],
        "question": [{"prompt": text, "answer": "no"} for text in SENTENCES],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return [f"{name}={tmp_path / name}.jsonl" for name in rows]


@pytest.fixture
def table(mixture, data, tmp_path):
    """Run `weft eval` with further options; the JSON that it writes."""

    def run(*options, data=data):
        file = tmp_path / "table.json"
        assert main(["eval", mixture, "--data", *data, "--max-new-tokens", "3", "--output", str(file), *options]) == 0
        return json.loads(file.read_text())

    return run


def test_every_row_is_what_it_says(table, mixture, data, base_adapters, capsys):
    let_the_gate_decide(mixture)
    found = table("--compare", f"again={mixture}", f"one={base_adapters['math']}", "--freeze-after", "3")
    values = found["perplexity"]
    merges = [f"merge {kind}" for kind in MERGES]
    experts = ["only math", "only code"]
    own = ["weft", "weft top-1", "weft frozen after 3"]
    assert list(values) == ["base", *experts, "uniform mix", *merges, "arrow", *own, "again", "one", "oracle"]
    assert list(values["weft"]) == ["math", "mixed", "unlabelled"]
    assert list(found["accuracy"]["weft"]) == ["choice"]
    assert list(found["exact_match"]["weft"]) == ["question"]
    assert found["impossible"] == {}

    # Two ways to the same model.
    assert values["merge cat"] == pytest.approx(values["uniform mix"], rel=1e-5)
    assert values["one"] == pytest.approx(values["only math"], rel=1e-5)
    assert values["again"] == values["weft"]
    assert (
        len({row["math"] for name, row in values.items() if name not in ("merge cat", "one", "again", "oracle")}) == 13
    )

    model = weft.from_pretrained(mixture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.config._name_or_path)
    sequences = tokenizer(SENTENCES)["input_ids"]
    assert values["weft"]["math"] == pytest.approx(perplexity(model, sequences, 4), rel=1e-5)
    model.set_topk_lora(1)
    assert values["weft top-1"]["math"] == pytest.approx(perplexity(model, sequences, 4), rel=1e-5)
    assert values["base"]["math"] == pytest.approx(perplexity(model.base_model.unload(), sequences, 4), rel=1e-5)

    assert set(values["oracle"]) == {"math", "mixed"}  # nobody knows the domains of the others
    assert values["oracle"]["math"] == values["only math"]["math"]
    assert found["accuracy"]["oracle"]["choice"] == found["accuracy"]["only code"]["choice"]
    low, high = found["interval"]["weft"]["math"]
    assert low < values["weft"]["math"] < high
    assert found["minus_weft"]["again"]["math"] == [0.0, 0.0]
    assert found["tokens_per_second"]["weft"] > 0
    shown = capsys.readouterr().out
    assert f"{values['weft']['math']:.2f} ±" in shown
    assert re.search("^math: better than weft: .*; worse: ", shown, flags=re.M)
    assert "merge ties: weight 1 each, density 0.5" in shown


def measured(value, low, high):
    return Measurement(value, value, value, 8, 100.0, 1.0, None, (low, high))


@pytest.mark.parametrize("metric", ["perplexity", "accuracy"])
def test_the_summary_names_what_is_better_what_is_worse_and_what_nobody_can_tell(metric):
    sign = 1 if metric == "perplexity" else -1
    above, below = sorted([sign * 0.5, sign * 1.0]), sorted([-sign * 0.5, -sign * 1.0])
    cells = {
        "base": measured(3.0, *above),
        "only math": measured(1.0, *below),
        "uniform mix": measured(2.0, -0.1, 0.1),
        "only code": measured(4.0, *above),
        "weft of May": measured(5.0, *above),
        "weft": Measurement(2.0, 2.0, 2.0, 8, 100.0, 1.0, None),
        "weft top-1": measured(9.0, *above),
        "oracle": measured(1.0, *below),
    }
    same_gate = frozenset({"weft", "weft top-1"})
    report = Report({"mixed": metric}, {row: {"mixed": cell} for row, cell in cells.items()}, same_gate=same_gate)
    assert notes(report) == [
        "mixed: better than weft: only math; worse: base, only code, weft of May; no difference that 8 examples could "
        "show: uniform mix"
    ]


def test_with_one_text_nothing_is_compared():
    alone = Measurement(2.0, math.nan, math.nan, 1, 100.0, 1.0, None)
    report = Report({"mixed": "perplexity"}, {row: {"mixed": alone} for row in ("base", "weft")})
    assert notes(report) == ["mixed: one text, with which nothing can be compared: give more texts"]
    assert render(report).title == "no interval: each data set is one text"


@pytest.fixture
def terminal(monkeypatch):
    """What is printed on a terminal of 80 columns."""
    screen = io.StringIO()
    console = VisibleConsole(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(evaluation, "results_console", lambda: console)
    return screen


def test_on_a_terminal_no_cell_and_no_word_is_broken(table, data, terminal):
    found = table("--rows", "base", "merges", "weft")
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for name, values in found["perplexity"].items():
        for value in values.values():
            assert re.search(rf"^│ {name} .* {value:.2f} ±\d+\.\d\d ", terminal.getvalue(), flags=re.M)
    joined = " ".join(terminal.getvalue().split())
    assert " ".join(" ".join(found["notes"]).split()) in joined
    for name in found["perplexity"]:
        assert joined.count(name) == terminal.getvalue().count(name)


def test_experts_and_the_uniform_mix_are_as_they_were_trained_whatever_the_mixtures_weight(
    table, mixture, data, tmp_path
):
    let_the_gate_decide(mixture)
    rows = ("--rows", "experts", "uniform", "weft", "oracle")
    before = table(*rows, data=data[:2])["perplexity"]
    model = weft.from_pretrained(mixture)
    model.set_global_scaling_weight(2.0)
    model.save_pretrained(mixture)
    (tmp_path / "table.cells.jsonl").unlink()
    after = table(*rows, data=data[:2])["perplexity"]
    assert after.pop("weft")["math"] != pytest.approx(before.pop("weft")["math"], rel=1e-4)
    assert after == before


def test_what_is_known_is_not_measured_again(table, mixture, tmp_path, data, monkeypatch):
    calls = []
    score = evaluation.score
    monkeypatch.setattr(
        evaluation, "score", lambda runner, data, advance: calls.append(data.name) or score(runner, data)
    )
    rows = ("--rows", "base", "weft", "oracle")
    first = table(*rows, data=data[:2])
    assert sorted(calls) == ["math"] * 3 + ["mixed"] * 4  # base, weft, and the experts that the oracle needs
    calls.clear()
    again = table(*rows, data=data[:2])
    assert calls == []
    assert again == first

    let_the_gate_decide(mixture)
    assert table(*rows, data=data[:2])["perplexity"]["weft"] != first["perplexity"]["weft"]
    assert calls == ["math", "mixed"]  # the mixture's own row
    calls.clear()
    (tmp_path / "math.jsonl").write_text(json.dumps({"text": "another text"}))
    table(*rows, data=data[:2])
    assert calls == ["math"] * 3
    calls.clear()

    kept = tmp_path / "table.cells.jsonl"
    kept.write_text(kept.read_text()[:-20])  # as after a process that was killed
    table(*rows, data=data[:2])
    assert len(calls) == 1
    table(*rows, data=data[:2])
    assert len(calls) == 1


LINE = {"digest": "0", "cell": {"scores": [[1.0, 2]], "seconds": 1.0, "peak_mb": None, "note": ""}}


WRONG_CELLS = [{"scores": [["a", 1]]}, {"scores": 5}, {"scores": [[1]]}, {"seconds": None}, {"note": 5}, {"more": 1}]


def with_cell(values):
    return json.dumps({**LINE, "cell": {**LINE["cell"], **values}}).encode()


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe", b"[" * 100_000, b"null", *map(with_cell, WRONG_CELLS)],
    ids=lambda line: str(line)[-50:-10],
)
def test_lines_that_are_no_cells_are_passed_over(line, tmp_path):
    file = tmp_path / "a.cells.jsonl"
    file.write_bytes(line + b"\n" + json.dumps({**LINE, "digest": "1"}).encode() + b"\n")
    cells = CellStore(file)
    assert "0" not in cells
    assert cells["1"].scores == [(1.0, 2)]


def test_what_cannot_be_written_is_known_before_anything_is_measured(mixture, data, tmp_path, capsys):
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("")
    for name, problem in {
        "folder.json": "cannot be written: Is a directory",
        "file/table.json": "cannot be written: there is no folder",
        f"{'x' * 300}.json": "cannot be written: File name too long",
    }.items():
        assert main(["eval", mixture, "--data", data[0], "--output", str(tmp_path / name)]) == 1
        assert re.search(rf"weft eval: error: output \(.*\) {problem}", capsys.readouterr().err)


def test_a_stopped_evaluation_keeps_what_is_finished(table, mixture, data, monkeypatch, capsys, tmp_path):
    score, calls = evaluation.score, []

    def interrupted(runner, data, advance):
        calls.append(data.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(runner, data, advance)

    monkeypatch.setattr(evaluation, "score", interrupted)
    output = str(tmp_path / "table.json")
    assert main(["eval", mixture, "--data", *data[:1], "--rows", "base", "weft", "--output", output]) == 130
    assert "stopped; finished cells are kept, the same command continues" in capsys.readouterr().err
    assert set(table("--rows", "base", "weft", data=data[:1])["perplexity"]) == {"base", "weft"}
    assert len(calls) == 3


def test_what_experts_of_different_ranks_make_impossible_is_said(base_folder, base_adapters, tmp_path, data):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    # Rank-stabilised and first: peft's merges copy its options.
    other = save_adapter(base, lora(r=6, use_rslora=True), tmp_path / "other", seed=5)
    paths = {"other": other, "math": base_adapters["math"]}
    weft.from_adapters(str(base_folder), paths).save_pretrained(tmp_path / "mixture")
    output = tmp_path / "table.json"
    rows = ["uniform", "merges", "arrow"]
    values = evaluate(EvalOptions(str(tmp_path / "mixture"), data=data[:1], rows=rows, output=str(output)))
    assert list(values) == ["uniform mix", "merge cat"]
    assert values["merge cat"]["math"] == pytest.approx(values["uniform mix"]["math"], rel=1e-5)
    found = json.loads(output.read_text())
    others = [*(f"merge {kind}" for kind in MERGES if kind != "cat"), "arrow"]
    reason = "the experts have different ranks (other 6, math 4)"
    assert found["impossible"] == dict.fromkeys(others, reason)
    assert found["notes"][0] == f"{', '.join(others)}: not possible: {reason}"


def test_experts_whose_parts_would_be_left_out_are_not_merged(base_folder, base_adapters, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    biased = save_adapter(base, lora(lora_bias=True), tmp_path / "biased", seed=5)
    paths = {"math": base_adapters["math"], "biased": biased}
    shared = SharedBase(transformers.AutoModelForCausalLM.from_pretrained(base_folder))
    message = "expert 'biased' has lora_bias, which peft would leave out here"
    side_by_side = quietly(shared.load, adapters(paths))
    with pytest.raises(AdapterError, match=message), merged(side_by_side, Merge("cat", 1.0), 0):
        pass
    with pytest.raises(AdapterError, match=message):
        shared.load(arrow(paths, 0))


def test_the_base_and_the_mixture_are_the_same_after_every_opponent(base_folder, base_adapters, mixture_folder):
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    modules = [type(module) for module in base.modules()]
    ids = torch.randint(0, 200, (2, 9))
    shared = SharedBase(base)
    first = shared.load(mixture(mixture_folder))(ids).logits
    for kind in MERGES:
        with merged(shared.load(adapters(base_adapters)), Merge.default(kind, 2), seed=0) as model:
            assert not torch.equal(model(ids).logits, first)
    shared.load(arrow(base_adapters, 0))(ids)
    assert torch.equal(shared.load(mixture(mixture_folder))(ids).logits, first)
    shared.clear()
    assert [type(module) for module in base.modules()] == modules
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.fixture
def mixture_folder(base_folder, base_adapters, tmp_path):
    folder = str(tmp_path / "mixture")
    weft.from_adapters(str(base_folder), base_adapters).save_pretrained(folder)
    let_the_gate_decide(folder)
    return folder


def test_a_searched_merge_is_no_worse_on_what_it_was_searched(table, data):
    plain = table("--rows", "merges", data=data[:1])["perplexity"]
    searched = table("--rows", "merges", "--search-data", data[0].partition("=")[2], data=data[:1])
    for row, values in searched["perplexity"].items():
        assert values["math"] <= plain[row]["math"] * (1 + 1e-6)
    assert sum(values["math"] < plain[row]["math"] for row, values in searched["perplexity"].items()) >= 3
    assert re.search(r"merge linear: weight [0-9.]+ each", "\n".join(searched["notes"]))


def test_the_table_is_written_in_three_formats(table, tmp_path, data):
    values = table(str(tmp_path / "t.md"), str(tmp_path / "t.csv"), "--rows", "base", "weft")
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert lines[0].startswith(
        "| | math (perplexity) | mixed (perplexity) | unlabelled (perplexity) | choice (accuracy)"
    )
    assert any(line.startswith("| weft | ") and "[" in line for line in lines)
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == ["base"] * 5 + ["weft"] * 5
    assert float(rows[0]["value"]) == values["perplexity"]["base"]["math"]


def test_a_cell_that_cannot_be_written_is_an_error_and_those_before_are_kept(tmp_path):
    file, cell = tmp_path / "t.cells.jsonl", Cell([(1.0, 2.0)], 0.5, None)
    cells = CellStore(file)
    with full_disk(size=200):
        cells.keep("a" * 64, "weft", "math", cell)
        with pytest.raises(CheckpointError) as raised:
            cells.keep("b" * 64, "weft", "code", cell)
    assert str(raised.value) == (
        f"{file} cannot be written: [Errno 27] File too large (what was measured before is kept in it); mend that, and "
        "the same command continues"
    )
    again = CellStore(file)
    again.keep("b" * 64, "weft", "code", cell)
    assert [name * 64 in CellStore(file) for name in "abc"] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "nonsense"], r"rows \(nonsense\) must be of base, experts, .*or rows: .*only math"),
        (["--stride", "16", "--sequence-length", "16"], r"stride \(16\) must be at least 0 and below sequence_length"),
        (["--sequence-length", "1"], r"sequence_length \(1\) must be at least 2"),
        (["--freeze-after", "0", "--batch-size", "0"], r"batch_size \(0\) must be at least 1(.|\n)*freeze_after \(0\)"),
        (["--output", "table.txt"], r"output \(table.txt\) must end in .json, .md, .csv"),
        (["--output", f"{'x' * 300}.json"], r"output \(x*.json\) cannot be written: File name too long; give an"),
        (
            ["--output", "{folder}.csv"],
            r"output: .*folder.cells.jsonl, where its cells are kept, cannot be added to: Is a directory; move it away",
        ),
        (["--output", "/nowhere/t.json"], r"output \(/nowhere/t.json\) cannot be written: there is no folder /nowhere"),
        (["--compare", "x"], r"compare has the entry 'x', expected name=FOLDER"),
        (["--compare", "x=a", "x=b"], r"compare has the name 'x' twice \(a and b\)"),
        (["--compare", "x=/nowhere"], r"compare x \(/nowhere\) is neither a folder here nor a Hub id"),
        (["--compare", "weft={mixture}"], r"compare names a row \(weft\) that is there already"),
        (
            ["--search-data", "{choice}"],
            r"search_data \(.*choice.jsonl\) must be texts: merges are chosen by perplexity",
        ),
    ],
)
def test_options_that_cannot_work_are_named(options, message, mixture, data, tmp_path, capsys, monkeypatch):
    (tmp_path / "folder.cells.jsonl").mkdir()
    places = {"mixture": mixture, "choice": tmp_path / "choice.jsonl", "folder": tmp_path / "folder"}
    options = [option.format(**places) for option in options]
    monkeypatch.setattr("weft.evaluate.run.score", None)  # nothing is measured before
    assert main(["eval", mixture, "--data", *data[:1], *options]) == 1
    assert re.search(message, capsys.readouterr().err)


# ---------------------------------------------------------------------- numbers that are none


@pytest.fixture
def broken(base_folder, base_adapters, base_without_z, tmp_path):
    """A mixture on a base in which the letter Z is NaN, and texts with and without it."""
    folder = tmp_path / "broken"
    weft.from_adapters(str(base_without_z), base_adapters).save_pretrained(folder)
    for name, text in (("good", "the quick brown fox"), ("bad", "a Zebra is striped")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join([json.dumps({"text": text})] * 3))
    return str(folder)


def strict(file):
    """The JSON of a file, as a reader takes it who knows no NaN."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(file.read_text(), parse_constant=refuse)


def test_what_is_not_finite_is_said_in_words_and_written_as_null(broken, tmp_path, capsys):
    files = [str(tmp_path / f"table.{ending}") for ending in ("json", "md", "csv")]
    data = [f"good={tmp_path}/good.jsonl", f"bad={tmp_path}/bad.jsonl"]
    assert main(["eval", broken, "--data", *data, "--rows", "base", "experts", "weft", "--output", *files]) == 0
    shown = capsys.readouterr().out
    assert "bad: perplexity is NaN for base, only math, only code, weft: the model gave no finite numbers" in shown
    assert "bad: nothing can be compared with weft, whose value is not finite" in shown
    assert "bad: better than weft" not in shown
    assert "good: better than weft: " in shown
    found = strict(tmp_path / "table.json")
    assert found["perplexity"]["weft"]["bad"] is None
    assert found["perplexity"]["weft"]["good"] > 0
    assert found["interval"]["base"]["bad"] == [None, None]
    assert any("perplexity is NaN for base" in note for note in found["notes"])
    assert weft.write_card(broken, evaluation=tmp_path / "table.json").is_file()


def test_a_loss_that_no_perplexity_can_hold_is_infinite_and_not_an_error(table, monkeypatch, capsys):
    def large(logits, input_ids):
        return torch.full((len(input_ids), input_ids.shape[1] - 1), 1000.0)

    monkeypatch.setattr("weft.evaluate.scoring.negative_log_likelihoods", large)
    found = table("--rows", "base", "weft")
    assert found["perplexity"]["base"] == {"math": None, "mixed": None, "unlabelled": None}
    assert any(note.startswith("math: perplexity is infinite for base, weft: ") for note in found["notes"])
    assert "inf" in capsys.readouterr().out


def test_a_row_that_is_not_finite_takes_no_part_in_the_comparison(table, monkeypatch, capsys):
    measured, calls = evaluation.score, []

    def spoiled(runner, data, advance):
        calls.append(1)
        scores = measured(runner, data, advance)
        return [(float("nan"), weight) for _, weight in scores] if len(calls) <= 5 else scores  # the first row

    monkeypatch.setattr(evaluation, "score", spoiled)
    found = table("--rows", "base", "experts", "weft")
    assert found["perplexity"]["base"]["math"] is None
    assert found["perplexity"]["weft"]["math"] > 0
    notes = [note for note in found["notes"] if note.startswith("math: ")]
    assert notes[0].startswith("math: perplexity is NaN for base: ")
    assert "base" not in notes[1]


def test_a_choice_with_a_probability_that_is_none_is_not_counted_as_right_or_wrong(broken, tmp_path):
    rows = [{"question": "the", "choices": ["fox", "Z"], "answer": 0}] * 3
    (tmp_path / "choice.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "table.json"
    data = f"choice={tmp_path}/choice.jsonl"
    assert main(["eval", broken, "--data", data, "--rows", "base", "weft", "--output", str(file)]) == 0
    assert strict(file)["accuracy"]["weft"]["choice"] is None

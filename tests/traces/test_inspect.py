"""`weft inspect` as a user meets it: in the terminal, as a page, a trace and a figure."""

import importlib.util
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

import weft
from traced import made
from weft.cli import main
from weft.cli.inspect import data_table, print_text
from weft.traces.figures import figure, write_figure
from weft.traces.summary import summarise
from weft.traces.trace import TracedText


@pytest.fixture
def data(tmp_path):
    for name in ("fox", "dog"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"the quick {name}"}))
    return [f"{name}={tmp_path / name}.jsonl" for name in ("fox", "dog")]


def test_a_text_is_printed_and_kept_as_page_trace_and_figure(mixture, tmp_path, capsys):
    files = {name: str(tmp_path / name) for name in ("page.html", "text.trace", "gates.pdf")}
    options = ["--html", files["page.html"], "--output", files["text.trace"], "--figure", files["gates.pdf"]]
    assert main(["inspect", mixture, "--text", "the <b>fox</b>", *options]) == 0
    shown = capsys.readouterr().out
    assert "the <b>fox</b>" in shown
    assert "14 tokens." in shown
    assert re.search(r"math .*%.*code .*%", shown, flags=re.S)
    assert all(name in shown for name in files.values())
    trace = weft.Trace.load(files["text.trace"])
    assert "".join(trace.pieces) == "the <b>fox</b>"
    assert trace.title == "mixture"
    assert "</html>" in (tmp_path / "page.html").read_text()
    assert (tmp_path / "gates.pdf").read_bytes().startswith(b"%PDF")

    assert main(["inspect", files["text.trace"], "--compare", files["text.trace"]]) == 0
    again = capsys.readouterr().out
    assert "the <b>fox</b>" in again
    assert "compared" in again


def test_data_sets_are_printed_as_a_matrix(mixture, data, capsys):
    assert main(["inspect", mixture, "--data", *data, "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "26 tokens in 2 texts" in shown
    assert "mean shares by data set" in shown
    assert re.search(r"fox .*%.*dog .*%", shown, flags=re.S)


def test_a_generation_is_shown_with_its_prompt(mixture, tmp_path, capsys):
    arguments = ["--generate", "the fox", "--max-new-tokens", "3", "--output", str(tmp_path / "g.trace")]
    assert main(["inspect", mixture, *arguments, "--title", "a fox"]) == 0
    assert "the fox" in capsys.readouterr().out
    trace = weft.Trace.load(tmp_path / "g.trace")
    assert trace.texts[0].prompt_length == 7
    assert 8 <= len(trace) <= 10
    assert trace.title == "a fox"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"text, data and generate are missing: give one of them"),
        (["--text", "a", "--generate", "b"], r"text and generate are both given: give one of them"),
        (["--text", "a", "--max-tokens", "0"], r"max_tokens \(0\) must be at least 1"),
        (
            ["--text", "a", "--html", "no/a.html"],
            r"html \(no/a.html\) cannot be written: there is no folder .*/no; give another",
        ),
        (["--text", "a", "--output", "/"], r"output \(/\) cannot be written: Is a directory; give another file"),
        (["--text", "a", "--figure", "gates.docx"], r"figure \(gates.docx\) must end in one of .pdf, .png, .svg"),
        (
            ["--text", "a", "--compare", "none.trace"],
            r"compare \(none.trace\) is not a file: give one that weft inspect --output",
        ),
        (["--generate", "a", "--temperature", "-1"], r"temperature \(-1.0\)"),
    ],
)
def test_options_that_cannot_work_are_said(mixture, arguments, message, capsys):
    assert main(["inspect", mixture, *arguments]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_trace_takes_no_text(tmp_path, capsys):
    made(["a", "b"]).save(tmp_path / "a.trace")
    assert main(["inspect", str(tmp_path / "a.trace"), "--text", "b"]) == 1
    assert "a.trace) is a trace already: leave text out" in capsys.readouterr().err


def test_a_figure_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"figure \(a.pdf\) needs matplotlib, .*: pip install 'weft\[figures\]'"):
        write_figure(made(["a", "b"]), "a.pdf")


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figures_are_written_whole_or_not_at_all(suffix, tmp_path):
    texts = (TracedText("$code_", 5), TracedText("_law", 5))
    trace = made(list("the texts."), experts=[f"e_{number}$" for number in range(10)], texts=texts)
    write_figure(trace, tmp_path / f"gates.{suffix}")
    assert (tmp_path / f"gates.{suffix}").stat().st_size > 1000
    with pytest.raises(ValueError, match=r"none/gates.\w+ cannot be written: .*; give another file"):
        write_figure(trace, tmp_path / "none" / f"gates.{suffix}")


def test_a_figure_has_the_panels_that_say_something():
    def titles(trace):
        return [axis.get_title() for axis in figure(trace).axes if axis.get_title()]

    pieces = list("text")
    assert len(titles(made(pieces))) == 3
    assert len(titles(made(pieces, texts=(TracedText("a", 2), TracedText("b", 2))))) == 4
    assert titles(made(pieces, num_layers=1)) == ["shares over position"]


def test_a_figure_of_many_experts_has_its_legend_below_and_no_numbers_on_top_of_each_other(tmp_path):
    texts = (TracedText("a", 5), TracedText("b", 5))
    drawn = figure(made(list("the texts."), experts=[f"expert {number}" for number in range(32)], texts=texts))
    drawn.savefig(tmp_path / "gates.png")  # which places all
    positions, *_, data_sets = (axis for axis in drawn.axes if axis.get_title())
    box, axes = (one.get_window_extent() for one in (positions.get_legend(), positions))
    assert box.y1 < axes.y0
    assert box.width < drawn.bbox.width
    assert not data_sets.texts


def test_data_sets_of_many_experts_name_the_three_largest():
    scalings = torch.zeros(4, 1, 9)
    scalings[:, 0, 8], scalings[:, 0, 2], scalings[:, 0, 5] = 0.5, 0.3, 0.2
    texts = (TracedText("a", 2), TracedText("b", 2))
    names = [f"e{number}" for number in range(9)]
    table = data_table(made(list("text"), experts=names, num_layers=1, scalings=scalings.half(), texts=texts))
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    assert re.search(r"a +│ e8 50.0% │ e2 30.0% │ e5 20.0%", console.file.getvalue())


def test_the_terminal_shows_each_token_in_its_experts_colour():
    scalings = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]])
    trace = made(["one", " two"], num_layers=1, scalings=scalings.half(), experts=("math", "code"))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", soft_wrap=True)
    print_text(trace, console)
    assert "\x1b[38;2;230;159;0mone\x1b[0m\x1b[38;2;86;180;233m two\x1b[0m" in console.file.getvalue()


def test_a_summary_says_who_leads_what_it_brings_and_where_the_gate_is_sure():
    scalings = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]] * 3 + [[[0.0, 1.0], [0.5, 0.5]]])
    better = made(
        list("text"),
        num_layers=2,
        scalings=scalings.half(),
        log_probs=torch.tensor([torch.nan, -1.0, -1.0, -1.0]),
        base_log_probs=torch.tensor([torch.nan, -2.0, -2.0, -2.0]),
    )
    assert summarise(better) == (
        "4 tokens. python leads 75% of them (mean share 0.62), law 25% (0.38). Here the mixture's perplexity is 2.72, "
        "the base model's 7.39: 63% lower, which is better. The gate is surest in model.layers.0.q_proj (entropy 0.00 "
        "of 1) and least sure in model.layers.0.v_proj (1.00)."
    )
    worse = made(list("text"), num_layers=1, log_probs=better.base_log_probs, base_log_probs=better.log_probs)
    assert "172% higher, which is worse" in summarise(worse)
    same = made(list("text"), num_layers=1, log_probs=better.log_probs, base_log_probs=better.log_probs)
    assert summarise(same).endswith("2.72: no difference.")
    many = made(list("text"), experts=list("abcdef"), num_left_out=1234)
    assert re.search(r"3 more \d+%\..*1,234 further tokens are left out of this trace\.", summarise(many))


def test_the_commands_and_the_python_of_the_documentation_run(mixture, base_folder, tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs/inspect.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-mixture").symlink_to(mixture)
    (tmp_path / "my-model").symlink_to(base_folder)
    for name in ("code", "law"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "the contract says"}))
    for command in re.findall(r"^weft .*$", text, flags=re.M):
        assert main(shlex.split(command)[1:]) == 0, command
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        exec(block, names)
    assert list(names["by_domain"].by_name()) == ["code", "law"]
    assert {"gates.html", "gates.pdf", "text.trace"} <= {path.name for path in tmp_path.iterdir()}

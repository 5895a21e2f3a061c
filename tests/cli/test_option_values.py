"""What no option can be is refused before anything is loaded, and what was not foreseen ends in a line."""

import math
import sys

import pytest
import yaml

from weft.cli import main
from weft.cli.option_files import load, refuse_large
from weft.errors import WeftError
from weft.options import GenerateOptions, InspectOptions, TrainOptions
from weft.options.values import value_problems

LAUGHS = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with one named mixture."""
    (tmp_path / "mixture").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(learning_rate=math.nan), "learning_rate (nan) must be a finite number"),
        (TrainOptions(epochs=math.inf), "epochs (inf) must be a finite number"),
        (TrainOptions(seed=-1), "seed (-1) must be a whole number from 0 to 4294967295"),
        (TrainOptions(seed=2**32), "seed (4294967296) must be a whole number from 0 to 4294967295"),
        (TrainOptions(max_steps=10**30), f"max_steps ({10**30}) must be a whole number below 2^63"),
        (TrainOptions(max_steps=10**5000), "max_steps (a int) must be a whole number below 2^63"),
        (GenerateOptions("m", prompt="a\ud83d"), r"prompt ('a\ud83d') holds half of a character: expected whole text"),
        (InspectOptions("m", title="\udcff"), r"title ('\udcff') holds half of a character: expected whole text"),
        (TrainOptions(data=["a\0b"]), r"data (['a\x00b']) holds a null character, which no file's name can have"),
        (TrainOptions(adapters={"a": "b\0"}), r"adapters ({'a': 'b\x00'}) holds a null character"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_option_can_be_is_named(options, message):
    (problem,) = value_problems(options)
    assert problem.startswith(message)


def test_other_options_are_left_alone():
    assert value_problems(TrainOptions(base="caf\udce9", data=["a.jsonl"], learning_rate=1e-3, max_steps=5)) == []
    assert value_problems(GenerateOptions("m", prompt="a 👍🏽 \0", top_p=None)) == []


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("train --data code=a.jsonl,law=b.jsonl", "data (code=a.jsonl,law=b.jsonl) … --data code=a.jsonl law=b.jsonl"),
        ("train --adapters code=a, law=b", "adapters (code=a, law=b) … --adapters code=a law=b"),
        ("train --adapters code=a,law=b=c poems=d", "… --adapters code=a law=b=c poems=d"),
        ("train --experts-from code=a,law=b", "experts_from (code=a,law=b) … --experts-from code=a law=b"),
        ("train --eval-data a.jsonl,{here}", "eval_data (a.jsonl,{here}) … --eval-data a.jsonl {here}"),
        ("train --expert-targets q_proj,v_proj", "expert_targets (q_proj,v_proj) … --expert-targets q_proj v_proj"),
        ("eval m --rows base,weft", "rows (base,weft) … --rows base weft"),
        ("eval m --compare x=a,y=b", "compare (x=a,y=b) … --compare x=a y=b"),
        ("fold m --weights code=0.5,law=0.5", "weights (code=0.5,law=0.5) … --weights code=0.5 law=0.5"),
        ("convert m --rename a=0,b=1", "rename (a=0,b=1) … --rename a=0 b=1"),
    ],
)
def test_items_that_commas_join_are_shown_as_they_are_written(line, right, capsys, tmp_path):
    here = tmp_path / "here.jsonl"
    here.touch()
    assert main(line.format(here=here).split()) == 1
    right = right.format(here=here).replace("…", "has commas between its items, expected spaces:")
    assert right in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a,b.jsonl", "code=a,b.jsonl", "a, b"])
def test_a_comma_may_be_of_a_files_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert value_problems(TrainOptions(data=["nowhere,nothing.jsonl", "user/a,b"])) == []
    (tmp_path / name.removeprefix("code=")).touch()
    assert value_problems(TrainOptions(data=[name])) == []


def test_the_command_line_says_so(capsys):
    assert main(["train", f"--max-steps={10**30}", "--seed=-3"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"weft train: error: the options cannot work:\n  - max_steps ({10**30}) must be")
    assert "seed (-3)" in error


def test_a_number_that_is_too_large_for_any_format_is_named(capsys):
    assert main(["chat", "mixture", f"--temperature={'9' * 400}"]) == 1
    assert "temperature (inf) must be a finite number" in capsys.readouterr().err


# ---------------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, "more than 100,000 values with its aliases written out"),
        ("a: &a [*a]", r"the alias \*a stands for nothing that is written before it"),
        ("a: *b", "undefined alias|stands for nothing"),
        ("[" * 40 + "]" * 40, "more than 32 levels of lists and tables in each other"),
        ("a: " + "x" * 2**20, "1,048,579 characters, expected at most 1,048,576"),
        ("a: [1, 2", "."),
        (f"a: {'9' * 5000}", r"a value that cannot be read \(Exceeds the limit"),
    ],
    ids=["billion laughs", "itself", "unknown", "deep", "large", "no YAML", "digits"],
)
def test_yaml_that_stands_for_too_much_is_refused(text, message, tmp_path, capsys):
    with pytest.raises(yaml.YAMLError, match=message):
        load(text)
    file = tmp_path / "options.yaml"
    file.write_text(text)
    try:
        code = main(["generate", "mixture", "--config", str(file)])
    except SystemExit as err:
        code = err.code
    assert code in (1, 2)
    assert "config" in capsys.readouterr().err


def test_a_few_aliases_are_read(tmp_path):
    text = "data: &files [a.jsonl, b.jsonl]\neval_data: *files\n"
    assert load(text) == {"data": ["a.jsonl", "b.jsonl"], "eval_data": ["a.jsonl", "b.jsonl"]}
    refuse_large(text)


@pytest.mark.parametrize(
    "prompt", ["[" * 3000, "{a: b", "&a [*a]", "*x", "- a\n- b", "!!python/object:x {}", "null", "1e3"]
)
def test_a_prompt_is_text_whatever_yaml_would_make_of_it(prompt, here, monkeypatch):
    seen = []
    monkeypatch.setattr("weft.cli.generate.generate", seen.append)
    assert main(["generate", "mixture", f"--prompt={prompt}"]) == 0
    assert seen[0].prompt == prompt


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "options.yaml is missing"),
        (lambda file: file.mkdir(), "options.yaml is a folder, expected a file"),
        (lambda file: file.write_bytes(b"prompt: caf\xe9"), "options.yaml is no UTF-8 text"),
        (lambda file: file.write_bytes(b" " * 2**21), r"has 2,097,152 bytes, expected at most 1,048,576"),
    ],
    ids=["missing", "folder", "not UTF-8", "large"],
)
@pytest.mark.parametrize("equals", [True, False])
def test_a_config_that_cannot_be_read_is_named(make, message, equals, tmp_path, capsys):
    file = tmp_path / "options.yaml"
    make(file)
    argv = [f"--config={file}"] if equals else ["--config", str(file)]
    assert main(["generate", "mixture", *argv]) == 1
    error = capsys.readouterr().err
    assert error.startswith("weft generate: error: config: ")
    assert message in error


# ---------------------------------------------------------------------- the last net


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.json"), "a.json: No such file or directory"),
        (PermissionError(13, "Permission denied", "a", None, "b"), "a, b: Permission denied"),
        (OSError("something"), "OSError: something"),
        (UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), "UnicodeEncodeError: 'utf-8' codec"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum recursion depth exceeded"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_was_not_foreseen_ends_in_a_line(raised, line, here, monkeypatch, capsys):
    def fail(options):
        raise raised

    monkeypatch.setattr("weft.cli.generate.generate", fail)
    assert main(["generate", "mixture", "--prompt", "x"]) == 1
    assert capsys.readouterr().err.startswith(f"weft generate: error: {line}")


def test_errors_of_the_program_itself_are_not_hidden(here, monkeypatch):
    def fail(options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("weft.cli.generate.generate", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["generate", "mixture", "--prompt", "x"])


def test_file_names_of_other_encodings_can_be_printed(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "caf\udce9").mkdir()
    monkeypatch.setattr("weft.cli.generate.generate", lambda options: print(f"saved to {options.model}"))
    assert main(["generate", "caf\udce9", "--prompt", "x"]) == 0
    assert capfd.readouterr().out == "saved to caf\\udce9\n"
    assert issubclass(WeftError, Exception)
    assert sys.stdout is not None

"""A command line and its files as options: what each spelling means, and what wrong ones are told."""

import re
import subprocess
import sys

import pytest

from weft.cli import main
from weft.cli.commands import COMMANDS
from weft.cli.errors import UsageError
from weft.cli.parser import parse
from weft.options import TrainOptions
from weft.options.described import options_of


def values(line, command="train"):
    return parse(command, line.split()).values


def said(line, capsys):
    """What a wrong command line is told."""
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    found = capsys.readouterr()
    assert found.out == ""
    return found.err


# ---------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--max-steps 3", {"max_steps": 3}),
        ("--max_steps=3", {"max_steps": 3}),
        ("--max-steps 3 --max-steps 4", {"max_steps": 4}),
        ("--learning-rate 1e-3", {"learning_rate": 1e-3}),
        ("--learning-rate 1", {"learning_rate": 1.0}),
        ("--entropy-loss-weight -0.5", {"entropy_loss_weight": -0.5}),
        ("--packing", {"packing": True}),
        ("--packing true", {"packing": True}),
        ("--packing=FALSE", {"packing": False}),
        ("--no-packing", {"packing": False}),
        ("--no_layerwise_scalings --packing off", {"layerwise_scalings": False, "packing": False}),
        ("--packing --resume", {"packing": True, "resume": True}),
        ("--data a b --base c", {"data": ["a", "b"], "base": "c"}),
        ("--data=a --base=c=d", {"data": ["a"], "base": "c=d"}),
        ('--data ["a","b"]', {"data": ["a", "b"]}),
        ('--adapters {"a":"b"}', {"adapters": {"a": "b"}}),
        ("--top-k-lora null --base null", {"top_k_lora": None, "base": None}),
        ("--gate-start labels --quantization nf4", {"gate_start": "labels", "quantization": "nf4"}),
    ],
)
def test_what_is_typed(line, expected):
    assert values(line) == expected
    assert TrainOptions(**expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "--prompt", "-- so"], {"model": "m", "prompt": "-- so"}),
        (["--prompt", "-x", "m"], {"model": "m", "prompt": "-x"}),
        (["--prompt=--seed", "--seed", "1", "m"], {"model": "m", "prompt": "--seed", "seed": 1}),
        (["--show-experts", "--", "--m"], {"model": "--m", "show_experts": True}),
        (["m", "--prompt", ""], {"model": "m", "prompt": ""}),
        (["-1", "--seed", "2"], {"model": "-1", "seed": 2}),
    ],
    ids=str,
)
def test_values_that_look_like_options(arguments, expected):
    assert parse("generate", arguments).values == expected


# ---------------------------------------------------------------------- earlier names


@pytest.mark.parametrize(
    ("earlier", "today", "value"),
    [("log-steps", "logging_steps", 7), ("warmup", "warmup_ratio", 0.5), ("gradient-accumulation", None, 2)],
)
def test_earlier_names_are_taken_and_said(earlier, today, value, tmp_path, capsys):
    today = today or "gradient_accumulation_steps"
    file = tmp_path / "options.yaml"
    for spelling in (earlier, earlier.replace("-", "_")):
        file.write_text(f"{spelling}: {value}\n")
        for arguments in ([f"--{spelling}={value}"], ["--config", str(file)]):
            given = parse("train", arguments)
            assert given.values == {today: value}
            assert given.renamed == [f"{earlier.replace('-', '_')} is called {today} now"]
    assert main(["train", f"--{earlier}", str(value)]) == 1
    assert f"weft train: {earlier.replace('-', '_')} is called {today} now\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["card", "push"])
def test_licence_is_taken_for_license(command):
    given = parse(command, ["my-mixture", *(["user/mixture"] if command == "push" else []), "--licence", "mit"])
    assert given.values["license"] == "mit"
    assert given.renamed == ["licence is called license now"]


def test_the_trainers_own_names_are_taken():
    line = "--per-device-train-batch-size 2 --num_train_epochs 3 --early-stopping-patience 4"
    assert values(line) == {"batch_size": 2, "epochs": 3.0, "early_stopping": 4}
    assert parse("train", line.split()).renamed == []


# ---------------------------------------------------------------------- wrong ones


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("generate m --promt x", "--promt is no option: did you mean --prompt?"),
        ("generate m --max-new 3 --prompt x", "--max-new is no option: did you mean --max-new-tokens?"),
        ("generate --promt x y z", "--promt is no option: did you mean --prompt?"),
        ("train --MAX-STEPS 3", "--MAX-STEPS is no option: did you mean --max-steps?"),
        ("train --max 3", "--max is no option: did you mean --max-steps or --max-tokens?"),
        ("train --no-pack", "--no-pack is no option: did you mean --no-packing?"),
        ("train --num-epochs 3", "--num-epochs is no option: did you mean --num-train-epochs?"),
        ("train --zzzz", "--zzzz is no option (weft train --help lists them)"),
        ("train -b x", "-b is no option (weft train --help lists them)"),
        ("train --lr 1e-3", "--lr is no option: did you mean --learning-rate?"),
        ("train --bs 4", "--bs is no option: did you mean --batch-size?"),
        ("train --grad-accum 2", "--grad-accum is no option: did you mean --gradient-accumulation-steps?"),
        ("train --gpu 1", "--gpu is no option (weft train --help lists them)"),
        (
            "train options.yaml",
            "'options.yaml' belongs to no option: give a file of options with --config options.yaml",
        ),
        ("train --packing maybe", "'maybe' belongs to no option: --packing must be true or false"),
        (
            "generate --model m",
            "--model is no option: give MODEL without a name",
        ),
        ("train --learning-rate abc", "--learning-rate ('abc') must be a number"),
        ("train --max-steps 1.5", "--max-steps ('1.5') must be a whole number"),
        ("train --max-steps", "--max-steps needs a value"),
        ("train --max-steps --packing", "--max-steps needs a value"),
        ("train --adapters --base .", "--adapters needs a value: NAME=FOLDER ..."),
        ("train --packing=maybe", "--packing ('maybe') must be true or false"),
        ("train --no-packing=true", "--no-packing takes no value ('true')"),
        ("train --gate-start best", "--gate-start ('best') must be one of random, labels, losses"),
        ("train spare", "'spare' belongs to no option: put a value that has spaces into quotes"),
        ("generate --prompt x", "MODEL is missing: folder or Hub id of a trained mixture"),
        ("push m", "REPO_ID is missing: repository, as user/name; it is created if it does not exist"),
        ("train --data [a", "data is no YAML that can be read, line 1: "),
        ("train --data {a:1}", "data ({'a:1': None}) must be a list of texts, FILE each"),
        ("train --quiet --verbose", "--quiet and --verbose exclude each other"),
        ("train --help=x", "--help takes no value ('x')"),
        ("train --print-config=all", "--print-config ('all') must be comments, skip_default or skip_null"),
    ],
)
def test_a_wrong_command_line_is_told_in_a_line(line, message, capsys):
    error = said(line, capsys)
    assert error.startswith(f"weft {line.split()[0]}: error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian --base x", "'trian' is no command: did you mean train? (weft --help lists them)"),
        ("--hlep", "'--hlep' is no option: did you mean --help? (weft --help lists them)"),
        ("zzz", "'zzz' is no command (weft --help lists them)"),
    ],
)
def test_a_wrong_command_is_told_the_nearest(line, message, capsys):
    assert said(line, capsys) == f"weft: error: {message}\n"


def test_all_that_is_wrong_is_said_at_once(capsys):
    assert said("train --promt x --learning-rate abc --max-steps", capsys) == (
        "weft train: error: these options cannot be read:\n"
        "  - --promt is no option (weft train --help lists them)\n"
        "  - --learning-rate ('abc') must be a number\n"
        "  - --max-steps needs a value\n"
    )


def test_what_cannot_be_read_hides_no_missing_file(capsys):
    assert said("train --dtype float3 --base /gone --data /no.jsonl", capsys) == (
        "weft train: error: these options cannot be read:\n"
        "  - --dtype ('float3') must be one of auto, float32, bfloat16, float16\n"
        "  - base (/gone) is neither a folder here nor a Hub id\n"
        "  - data (/no.jsonl) is not a file: give .jsonl, .csv, .tsv, .parquet or text files, or a data set's name\n"
    )


def test_what_is_missing_is_named_before_torch_is_there():
    code = "import sys; from weft.cli import main\nprint(main(sys.argv[1:]), 'torch' in sys.modules)"
    lines = {
        "train": "base is missing: the folder or Hub id(.|\n)*adapters is missing(.|\n)*data is missing",
        "generate m": "prompt is missing",
        "eval m": "data is missing",
        "fold m": "output is missing: a folder for the adapter\n  - weights and data are missing",
        "inspect m": "text, data and generate are missing: give one of them",
    }
    for line, message in lines.items():
        found = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, check=True)
        assert found.stdout == "1 False\n"
        assert re.search(message, found.stderr), found.stderr


# ---------------------------------------------------------------------- files


def test_a_file_has_names_of_either_kind_and_what_follows_it_wins(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("max-steps: 3\nlearning_rate: 1e-3\ndata: a.jsonl\nadapters: {a: b}\nresume: yes\nbase:\n")
    found = parse("train", ["--max-steps", "2", "--config", str(file), "--resume", "false"]).values
    assert found == {
        **{"max_steps": 3, "learning_rate": 1e-3, "data": ["a.jsonl"], "adapters": {"a": "b"}},
        **{"resume": False, "base": None},
    }
    inline = parse("train", ["--config", '{"base": "x", max_steps: 4}']).values
    assert inline == {"base": "x", "max_steps": 4}


def test_files_may_be_a_table_by_name(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("data: {code: a.jsonl, law: b.jsonl}\nadapters: {code: x}\n")
    found = parse("train", ["--config", str(file)]).values
    assert found == {"data": ["code=a.jsonl", "law=b.jsonl"], "adapters": {"code": "x"}}


def test_a_positional_may_stand_in_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("model: m\nprompt: hello\n")
    assert parse("generate", ["--config", str(file)]).values == {"model": "m", "prompt": "hello"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("promt: x", "options.yaml) has 'promt', which is no option: did you mean prompt?"),
        ("seed: 1\nseed: 2", "is no YAML that can be read, line 2: 'seed' is there twice"),
        ("top-k: 1\ntop_k: 2", "options.yaml) has 'top_k' twice, under two spellings"),
        ("prompt: 5", "prompt (5) must be a text: put it into quotes"),
        ("seed: x", "seed ('x') must be a whole number"),
        ("seed: 1.5", "seed (1.5) must be a whole number"),
        ("seed: true", "seed (True) must be a whole number"),
        ("temperature: [1]", "temperature ([1]) must be a number"),
        ("show_experts: 1", "show_experts (1) must be true or false"),
        ("dtype: float8", "dtype ('float8') must be one of auto, float32, bfloat16, float16"),
        ("seed:", "seed (None) must be a whole number"),
        ("- a\n- b", "must be a table of options, a line `name: value` each"),
        ("prompt", "must be a table of options, a line `name: value` each"),
        ("prompt: [a", "is no YAML that can be read, line 1: "),
    ],
)
def test_wrong_values_in_a_file_are_named(text, message, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as raised:
        parse("generate", ["m", "--config", str(file)])
    assert message in str(raised.value)
    assert "--" not in str(raised.value)  # is no option of the command line


def test_a_text_without_its_option_is_shown_how_to_be_given():
    with pytest.raises(UsageError, match="'hello world' belongs to no option: give a text with --prompt 'hello world'"):
        parse("generate", ["mixture", "hello world"])


@pytest.mark.parametrize("flag", ["--print-config", "--print_config", "--print-config=comments"])
def test_the_printed_config_is_one(flag, tmp_path, capsys):
    line = ["train", "--base", "b", "--adapters", "a=b", "c=d", "--no-layerwise-scalings", "--learning-rate", "1e-4"]
    assert main([*line, flag]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert TrainOptions(**parse("train", ["--config", str(file)]).values) == TrainOptions(
        **parse("train", line[1:]).values
    )
    assert ("# Peak learning rate of AdamW.\nlearning_rate: 0.0001\n" in text) == flag.endswith("comments")


def test_the_printed_config_can_be_what_was_given(capsys):
    assert main(["train", "--base", "b", "--top-k-lora", "2", "--print-config=skip_default"]) == 0
    assert capsys.readouterr().out == "base: b\ntop_k_lora: 2\n"
    assert main(["generate", "--print-config=skip_null"]) == 0
    found = capsys.readouterr().out
    assert "model" not in found
    assert "null" not in found


@pytest.mark.parametrize("name", COMMANDS)
def test_all_defaults_can_be_written_and_read(name, tmp_path, capsys):
    assert main([name, "--print-config"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "options.yaml"
    file.write_text(text)
    given = parse(name, ["--help", "--config", str(file)])
    assert given.problems == []
    options = COMMANDS[name].options
    first = ["x" for option in options_of(options) if option.positional]
    assert options(*first, **given.values) == options(*first)

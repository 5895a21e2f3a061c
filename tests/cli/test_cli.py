"""The command line as a user meets it: train, eval, generate, and what it says when something is wrong."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers

import weft
from models import folder_files, tiny_tokenizer
from weft.cli import main


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [{"text": f"the quick brown fox {i} " * 4} for i in range(12)]
    rows.append({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture
def arguments(base_folder, base_adapters, data, tmp_path):
    """`weft train` with few steps, as a list to add to."""
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]
    return [
        *("train", "--base", str(base_folder), "--adapters", *adapters, "--data", str(data)),
        *("--output", str(tmp_path / "out"), "--max-steps", "4", "--batch-size", "2", "--sequence-length", "16"),
    ]


def gate(folder):
    return weft.from_pretrained(folder).internal_xlora_classifier.state_dict()


def test_train_then_eval_then_generate(arguments, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments) == 0
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "experts/math/adapter_model.safetensors",
    } <= set(folder_files(out))
    before = weft.from_adapters(weft.from_pretrained(out).base_model.unload(), {"math": str(out / "experts/math")})
    assert before.xlora_config.num_experts == 1

    table = tmp_path / "table.json"
    assert main(["eval", str(out), "--data", f"fox={data}", "--sequence-length", "16", "--output", str(table)]) == 0
    rows = json.loads(table.read_text())["perplexity"]
    assert list(rows)[:4] == ["base", "only math", "only code", "uniform mix"]
    assert all(math.isfinite(value) for row in rows.values() for value in row.values())
    assert f"{rows['weft']['fox']:.2f}" in capsys.readouterr().out

    assert main(["generate", str(out), "--prompt", "the quick", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the quick")


def test_training_lowers_the_loss_and_is_repeatable(arguments, tmp_path):
    arguments += ["--learning-rate", "0.05", "--max-steps", "36", "--logging-steps", "1"]
    assert main(arguments) == 0
    first = gate(tmp_path / "out")
    state = json.loads((tmp_path / "out/checkpoints/checkpoint-36/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert sum(losses[-12:]) < sum(losses[:12])
    arguments[arguments.index("--output") + 1] = str(tmp_path / "again")
    assert main(arguments) == 0
    second = gate(tmp_path / "again")
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("train_experts", ["false", "true"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(arguments, tmp_path, train_experts):
    arguments += ["--save-steps", "2", "--use-trainable-adapters", train_experts]
    assert main(arguments) == 0
    whole = weft.from_pretrained(tmp_path / "out").state_dict()
    # Half-way: remove what came after step 2.
    checkpoints = tmp_path / "out/checkpoints"
    subprocess.run(["rm", "-r", str(checkpoints / "checkpoint-4")], check=True)
    assert main([*arguments, "--resume", "true"]) == 0
    resumed = weft.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_options_from_yaml_and_the_command_line_agree(arguments, base_folder, base_adapters, data, tmp_path):
    options = {
        "base": str(base_folder),
        "adapters": base_adapters,
        "data": [str(data)],
        "output": str(tmp_path / "yaml"),
        "max_steps": 4,
        "batch_size": 2,
        "sequence_length": 16,
    }
    file = tmp_path / "train.yaml"
    file.write_text(json.dumps(options))  # JSON is YAML
    assert main(["train", "--config", str(file)]) == 0
    assert main(arguments) == 0
    one, other = gate(tmp_path / "yaml"), gate(tmp_path / "out")
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_model_and_a_checkpoint_to_resume_from(arguments, tmp_path):
    arguments[arguments.index("--max-steps") + 1] = "2000"
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", *arguments, "--save-steps", "5"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    checkpoints = tmp_path / "out/checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "continue with --resume true" in errors
    assert "Traceback" not in errors
    weft.from_pretrained(tmp_path / "out")
    last = transformers.trainer_utils.get_last_checkpoint(str(checkpoints))
    step = int(last.rpartition("-")[2])
    arguments[arguments.index("--max-steps") + 1] = str(step + 1)
    assert main([*arguments, "--resume", "true"]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "/nowhere"}, r"base \(/nowhere\) is neither a folder here nor a Hub id"),
        ({"--data": "/nowhere.jsonl"}, r"data \(/nowhere.jsonl\) is not a file"),
        ({"--adapters": "math"}, "adapters has the entry 'math', expected name=FOLDER"),
        ({"--adapters": "math=/nowhere"}, r"adapter 'math' \(/nowhere\) is neither a folder here nor a Hub id"),
        (
            {"--sequence-length": "100000"},
            r"sequence_length \(100000\) must be at most the model's number of positions",
        ),
        (
            {"--learning-rate": "0", "--batch-size": "0"},
            r"batch_size \(0\) must be(.|\n)*learning_rate \(0.0\) must be",
        ),
        ({"--top-k-lora": "3"}, r"top_k_lora \(3\) must be between 1 and the number of adapters \(2\)"),
        ({"--output": f"{__file__}/out"}, r"output \(.*\) cannot be made: .*test_cli.py is a file, expected a folder"),
        ({"--output": "/proc/weft"}, r"output \(/proc/weft\) cannot be made: "),
        ({"--output": __file__}, r"output \(.*\) cannot be made: .*test_cli.py is a file, expected a folder"),
        ({"--resume": "true"}, r"resume \(True\) found no checkpoint in"),
    ],
)
def test_bad_input_is_an_error_without_a_traceback(arguments, change, message, capsys, tmp_path):
    for option, value in change.items():
        if option == "--adapters":
            start = arguments.index(option)
            arguments[start + 1 : start + 3] = [value]
        elif option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("weft train: error: ") or "weft train: error: " in errors
    assert re.search(message, errors), errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_found_before_anything_is_loaded(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("weft.files.writing.os.access", lambda *args: False)
    arguments[arguments.index("--base") + 1] = "/nowhere"
    assert main(arguments) == 1
    message = f"output ({tmp_path / 'out'}) cannot be made: {tmp_path} is not yours to write in"
    assert message in capsys.readouterr().err


def test_a_used_output_folder_is_not_mixed_with_another_run(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    assert main(arguments) == 1
    assert f"output ({tmp_path / 'out'}) holds the checkpoints of a run" in capsys.readouterr().err
    other = [*arguments, "--resume", "true", "--xlora-depth", "1"]
    assert main(other) == 1
    assert "xlora_depth (1) must be what the run to resume has (2)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "eval MODEL --data {data}",
        "eval MODEL --base {base} --data {data}",
        "generate MODEL --prompt x",
        "generate MODEL --base {base} --prompt x",
        "inspect MODEL --text x",
        "chat MODEL",
        "serve MODEL --engine embedded --port 0",
        "fold MODEL --weights math=1 --output {out}",
        "convert MODEL --to peft --output {out}",
        "card MODEL",
        "push MODEL me/mixture --dry-run",
        "add-expert MODEL code={adapter} --output {out}",
        "drop-expert MODEL math --output {out}",
        "train --start-from MODEL --data {data} --output {out}",
    ],
)
def test_a_base_model_or_an_adapter_in_the_place_of_a_mixture_is_named(
    line, base_folder, base_adapters, data, capsys, tmp_path
):
    adapter, out = base_adapters["math"], tmp_path / "out"
    for folder, message in (
        (
            base_folder,
            f"{base_folder} is a base model, not a mixture: weft train --base {base_folder} --adapters NAME=",
        ),
        (adapter, f"{adapter} is one adapter, not a mixture: weft train --base MODEL --adapters NAME={adapter} NAME="),
    ):
        words = line.replace("MODEL", str(folder))
        assert main(words.format(data=data, base=base_folder, adapter=adapter, out=out).split()) == 1
        assert f"weft {line.split()[0]}: error: {message}" in capsys.readouterr().err
        assert not out.exists()


def test_a_folder_without_a_mixture_is_told_what_it_holds(mixture, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    for step in (9, 10):
        shutil.copytree(mixture, tmp_path / f"run/checkpoints/checkpoint-{step}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("")
    run = f"it holds the checkpoints of a run, which --resume true continues; {tmp_path}/run/checkpoints/checkpoint-10"
    for folder, message in (
        ("empty", "it is empty"),
        ("notes", "it holds todo.txt"),
        ("run", run),
        ("run/checkpoints", run),
    ):
        assert main(["generate", str(tmp_path / folder), "--prompt", "x"]) == 1
        said = f"{tmp_path / folder}/adapter_config.json is missing, so this is no mixture: {message}"
        assert said in capsys.readouterr().err
    assert main(["generate", f"{mixture}/experts", "--prompt", "x"]) == 1
    assert "it holds the folders of adapters or mixtures (code, math): give the mixture's" in capsys.readouterr().err


def test_a_base_model_is_not_compared(mixture, base_folder, data, capsys):
    assert main(["eval", mixture, "--data", str(data), "--compare", f"x={base_folder}"]) == 1
    message = f"compare (x={base_folder}) is a base model, expected a mixture or an adapter of this one"
    assert message in capsys.readouterr().err


def test_missing_options_are_all_named(capsys):
    assert main(["train"]) == 1
    errors = capsys.readouterr().err
    assert all(f"{name} is missing" in errors for name in ("base", "adapters", "data"))
    assert main(["generate", "/nowhere"]) == 1
    assert "prompt is missing" in capsys.readouterr().err
    assert main(["eval", "/nowhere", "--data", "x.jsonl"]) == 1
    assert "model (/nowhere) is neither a folder here nor a Hub id" in capsys.readouterr().err
    assert main(["eval", "/nowhere"]) == 1
    assert "data is missing" in capsys.readouterr().err


def test_wrong_usage_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--no-such-option", "1"])
    assert stopped.value.code == 2
    assert main([]) == 2
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", [[], ["train"], ["eval"], ["generate"], ["chat"], ["fold"], ["add-expert"], ["drop-expert"]]
)
def test_help_needs_no_torch(command):
    code = "import sys; from weft.cli import main\ntry: main(sys.argv[1:])\nfinally: print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert shown.endswith("False\n")
    assert "mix" in shown


def test_sampling_is_repeatable_by_its_seed(arguments, tmp_path, capsys):
    assert main(arguments) == 0
    texts = []
    for seed in ("1", "1", "2"):
        capsys.readouterr()
        options = ["--temperature", "1.5", "--seed", seed, "--max-new-tokens", "12"]
        assert main(["generate", str(tmp_path / "out"), "--prompt", "the", *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_prints_what_generate_generates(mixture, base_folder, capsys):
    assert main(["generate", mixture, "--prompt", "[bold]the", "--max-new-tokens", "12"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_folder)
    inputs = tokenizer("[bold]the", return_tensors="pt")
    found = weft.from_pretrained(mixture).generate(**inputs, max_new_tokens=12, do_sample=False)
    assert capsys.readouterr().out == tokenizer.decode(found[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("switch", [["--show-experts", "true"], ["--show-experts"], ["--show_experts=true"]], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_show_experts_names_them_and_their_shares(mixture, switch, last, capsys):
    others = [mixture, "--prompt", "the", "--max-new-tokens", "4"]
    assert main(["generate", *(others if last else []), *switch, *([] if last else others)]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert lines[0] == "experts:  math  code"
    assert lines[1].startswith("the")
    shares = re.fullmatch(r"experts:  math (\d+)%  code (\d+)%", lines[-2])
    assert sum(map(int, shares.groups())) == pytest.approx(100, abs=1)


def test_a_switch_can_be_off(mixture, capsys):
    assert main(["generate", "--show-experts", "false", mixture, "--prompt", "the", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("the")


def test_options_of_decoding_are_checked_before_the_model_is_loaded(capsys):
    assert main(["generate", "/nowhere", "--prompt", "the", "--temperature", "-1", "--top-k", "0"]) == 1
    errors = capsys.readouterr().err
    assert "temperature (-1.0) must be a finite number of at least 0" in errors
    assert "top_k (0) must be at least 1" in errors


def test_training_evaluates_reports_and_saves_the_best(arguments, data, tmp_path):
    arguments += ["--eval-data", f"math={data}", "--eval-steps", "1", "--early-stopping", "2"]
    arguments += [
        "--report-to",
        "tensorboard",
        "--learning-rate",
        "20",
        "--logging-steps",
        "1",
        "--balance-loss-weight",
        "0.1",
    ]
    arguments[arguments.index("--max-steps") + 1] = "30"
    assert main(arguments) == 0
    checkpoints = tmp_path / "out/checkpoints"
    last = transformers.trainer_utils.get_last_checkpoint(str(checkpoints))
    state = json.loads((checkpoints / last / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert state["global_step"] == best + 2 < 30
    saved = weft.from_pretrained(checkpoints / f"checkpoint-{best}").internal_xlora_classifier.state_dict()
    assert all(torch.equal(value, gate(tmp_path / "out")[key]) for key, value in saved.items())
    trained = next(entry for entry in state["log_history"] if "loss" in entry)
    assert {"gate/share/math", "gate/entropy", "gate/balance_loss"} <= set(trained)
    assert list(checkpoints.rglob("events.out.tfevents*"))


def test_training_learns_which_file_belongs_to_which_expert(arguments, tmp_path):
    for name, word in (("math", "seven"), ("code", "return")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{word} " * 6}) for _ in range(8)))
    start = arguments.index("--data")
    files = [f"{name}={tmp_path / name}.jsonl" for name in ("math", "code")]
    arguments[start + 1 : start + 2] = [*files, arguments[start + 1]]
    arguments += ["--expert-label-loss-weight", "5", "--learning-rate", "0.05", "--logging-steps", "30"]
    arguments[arguments.index("--max-steps") + 1] = "30"
    assert main(arguments) == 0
    model, tokenizer = weft.from_pretrained(tmp_path / "out"), tiny_tokenizer()
    for number, word in enumerate(("seven", "return")):
        with torch.no_grad():
            model(**tokenizer(f"{word} {word}", return_tensors="pt"))
        assert model.get_latest_scalings().mean((0, 1, 2))[number] > 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-steps", "5"], r"eval_steps \(5\) needs eval_data: held-out texts"),
        (["--early-stopping", "2"], r"early_stopping \(2\) needs eval_data: held-out texts"),
        (["--early-stopping", "-1"], r"early_stopping \(-1\) must be at least 0"),
        (["--eval-steps", "-1"], r"eval_steps \(-1\) must be at least 0"),
        (["--balance-loss-weight", "-1"], r"balance_loss_weight \(-1.0\) must be a finite number of at least 0"),
        (
            ["--expert-label-loss-weight", "1"],
            r"need labels, and data \(.*\) names none of the experts \['math', 'code'\]",
        ),
    ],
)
def test_options_of_evaluation_and_of_the_gates_losses_are_checked(arguments, options, message, capsys):
    assert main([*arguments, *options]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_an_output_that_is_full_is_an_error(mixture):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "weft", "card", mixture], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "weft card: error: the output cannot be written: No space left on device; free some" in done.stderr
    assert "Traceback" not in done.stderr

"""What other libraries say that nobody can act on is hidden, unless it is asked for; what else they say is not."""

import logging
import re
import subprocess
import sys
import warnings

import pytest
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import weft
from models import tiny_llama
from weft.cli import main
from weft.screen.libraries import import_warnings_hidden, libraries_hushed
from weft.screen.loudness import NORMAL, QUIET, VERBOSE, is_quiet, is_verbose, loudness
from weft.screen.visible import notice

LINES = {
    "torchao": ("Failed to load /x/_C.so: no such symbol", "Skipping import of cpp extensions due to a torch"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community: none",),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported by torch.compile",),
}


@pytest.mark.parametrize("name", LINES)
def test_their_notices_are_hidden_and_nothing_else(name, caplog, monkeypatch):
    logger = logging.getLogger(name)
    monkeypatch.setattr(logger, "handlers", [caplog.handler])  # torch's hand nothing on
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    for line in LINES[name]:
        logger.warning(line)
        with loudness(VERBOSE):
            logger.warning(line)
    logger.warning("something else")
    assert [record.msg for record in caplog.records] == [*LINES[name], "something else"]


def test_loudness_is_the_last_one_that_was_asked_for(capsys):
    with loudness(VERBOSE):
        with loudness(QUIET):
            assert is_quiet()
            notice("left out")
        assert is_verbose()
        assert not is_quiet()
        notice("said")
    assert capsys.readouterr().out == "said\n"


def test_making_a_mixture_warns_of_nothing(llama_adapters):
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.simplefilter("error")
        weft.from_adapters(tiny_llama(), llama_adapters)


def test_wefts_own_warnings_are_lines_of_the_command(capsys):
    with loudness(NORMAL), libraries_hushed("weft train"):
        warnings.simplefilter("always", UserWarning)
        warnings.warn("no expert acts", stacklevel=1)
    assert capsys.readouterr().err == "weft train: warning: no expert acts\n"
    with loudness(QUIET), libraries_hushed("weft train"):
        warnings.warn("no expert acts", stacklevel=1)
    assert capsys.readouterr().err == ""


def test_bars_of_downloads_are_shown_and_no_others():
    with libraries_hushed("weft pull"):
        assert not are_progress_bars_disabled()
        assert not transformers.logging.is_progress_bar_enabled()
    with loudness(QUIET), libraries_hushed("weft pull"):
        assert are_progress_bars_disabled()
    assert transformers.logging.is_progress_bar_enabled()
    disable_progress_bars()  # as whoever calls a command from Python may have done
    try:
        with libraries_hushed("weft pull"):
            assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()


@pytest.fixture
def command(base_folder, base_adapters, tmp_path):
    """`weft train` of one step."""
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "the quick brown fox"}\n' * 4)
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]
    return [
        *("train", "--base", str(base_folder), "--adapters", *adapters, "--data", str(data), "--max-steps", "1"),
        *("--output", str(tmp_path / "out"), "--xlora-size", "8"),
    ]


def test_quiet_leaves_results_and_errors(command, tmp_path, capfd):
    assert main(["--quiet", *command]) == 0
    out = tmp_path / "out"
    assert capfd.readouterr() == (f"saved to {out}: try  weft generate {out} --prompt '...'\n", "")
    assert main([*command, "--quiet"]) == 1
    found = capfd.readouterr()
    assert found.out == ""
    assert found.err.startswith("weft train: error: output (")


def test_verbose_lets_through_what_libraries_say(command, capfd):
    assert main(command) == 0
    assert "Loading weights" not in capfd.readouterr().err
    command[command.index("--output") + 1] += "-again"
    assert main([*command, "--verbose"]) == 0
    found = capfd.readouterr()
    assert "Loading weights" in found.err
    assert "trained to step 1" in found.out


@pytest.mark.slow
def test_the_screen_has_only_what_weft_says(command, tmp_path):
    ran = subprocess.run([sys.executable, "-m", "weft", *command], capture_output=True, text=True, check=True)
    assert re.sub(r"loading .* \.\.\.\n", "", ran.stderr) == ""  # weft says so on a busy machine
    assert "saved to" in ran.stdout


SCRIPT = """
import sys, warnings
import weft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from weft.options import TrainOptions
from weft.train import train_experts, train

logging.disable_progress_bar()  # of loading and saving
base, data, out, *adapters = sys.argv[1:]
adapters = dict(adapter.split("=") for adapter in adapters)
tokenizer = AutoTokenizer.from_pretrained(base)
model = weft.from_adapters(AutoModelForCausalLM.from_pretrained(base), adapters)
weft.fit_gate(model, ["the quick brown fox", "jumps over the lazy dog"], tokenizer=tokenizer)
model.save_pretrained(out + "/saved")
model = weft.from_pretrained(out + "/saved")
weft.generate(model, "the quick", tokenizer=tokenizer, max_new_tokens=2)
weft.trace(model, "the quick", tokenizer=tokenizer)
weft.mean_scalings(model, ["the quick"], tokenizer=tokenizer)
common = {"base": base, "max_steps": 1, "expert_steps": 1}
train(TrainOptions(adapters=adapters, data=[data], eval_data=[data], output=out + "/trained", **common))
train_experts(TrainOptions(experts_from=["a=" + data], output=out + "/experts", **common))

import peft, transformers
base_size = model.config.hidden_size
weft.register_with_peft()
config = peft.XLoraConfig(adapters=adapters, hidden_size=base_size)
model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out + "/saved")
rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2
arguments = transformers.TrainingArguments(out + "/own", max_steps=1, report_to="none", disable_tqdm=True)
trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[weft.GateCallback()])
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()

print("its own:", file=sys.stderr)
from peft import LoraConfig, get_peft_model
next(iter(torch.utils.data.DataLoader([1], pin_memory=True)))
get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
warnings.warn("an older name", DeprecationWarning)
"""


def test_filters_that_a_module_sets_while_it_is_imported_stay():
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with import_warnings_hidden():
            with import_warnings_hidden():
                warnings.warn("of an older name", DeprecationWarning, stacklevel=1)
            warnings.warn("of an escape", SyntaxWarning, stacklevel=1)
            warnings.warn("of a number", UserWarning, stacklevel=1)
            warnings.filterwarnings("ignore", "what a module hides")
        warnings.warn("what a module hides", stacklevel=1)
        warnings.warn("of an older name again", DeprecationWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["of a number", "of an older name again"]
    assert list(warnings.filters) == before


def test_a_script_hears_of_its_own_code_and_nothing_of_wefts(base_folder, base_adapters, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "the quick brown fox"}\n' * 4)
    adapters = [f"{name}={path}" for name, path in base_adapters.items()]
    command = [sys.executable, "-W", "default", "-c", SCRIPT, str(base_folder), str(data), str(tmp_path), *adapters]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    of_weft, its_own = ran.stderr.split("its own:\n")
    assert (ran.returncode, of_weft) == (0, "")
    assert "an older name" in its_own
    if int(transformers.__version__.split(".")[1]) >= 10:  # torch 2.6 and transformers 5.0 do not say these
        for said in ("'pin_memory' argument is set as true", "`is_gradient_checkpointing` is deprecated"):
            assert said in its_own


@pytest.mark.slow
def test_importing_peft_after_weft_says_nothing():
    ran = subprocess.run(
        [sys.executable, "-c", "import weft, peft.tuners.lora"], capture_output=True, text=True, check=True
    )
    assert (ran.stdout, ran.stderr) == ("", "")

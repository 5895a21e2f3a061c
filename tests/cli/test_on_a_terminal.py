"""What a person sees who types commands in a terminal of 80 columns."""

import json
import re
import shutil
import sys

import huggingface_hub
import pytest
import transformers

import weft
from models import lora, save_adapter
from terminals import Terminal, widths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal"),
]
LOADING = "loading torch, transformers, peft ..."
ERASED = "\r\x1b[K"


@pytest.fixture
def many(base_folder, tmp_path):
    """A mixture of twelve experts with long names, and texts in many data sets."""
    base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
    names = [f"expert-of-the-long-name-{number}" for number in range(12)]
    adapters = {name: save_adapter(base, lora(), tmp_path / name, seed=1) for name in names}
    weft.from_adapters(str(base_folder), adapters).save_pretrained(tmp_path / "many")
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"the quick brown fox {number}"}) for number in range(8)))
    return str(tmp_path / "many"), [f"data-set-{number}={file}" for number in range(6)]


def run(*command, **environment):
    """All that a command shows."""
    with Terminal("-m", "weft", *command, **environment) as terminal:
        assert terminal.end() == 0, terminal.shown
        return terminal


def test_the_first_sign_of_life_comes_before_torch_and_goes(mixture):
    terminal = run("generate", mixture, "--prompt", "the", "--max-new-tokens", "2")
    assert terminal.shown.startswith(f"{LOADING}{ERASED}loading ")
    assert terminal.shown.rpartition(ERASED)[2].startswith("the")
    whole = re.sub(r"loading [^\r]* \.\.\.\r\x1b\[K", "", terminal.shown)
    assert "loading" not in whole


def test_lines_of_a_training_fit(many, tmp_path):
    folder, data = many
    terminal = run(
        *("train", "--start-from", folder, "--data", data[0].partition("=")[2], "--max-steps", "2"),
        *("--logging-steps", "1", "--output", str(tmp_path / "out"), "--batch-size", "2"),
    )
    assert "step 1/2  loss " in terminal.shown
    assert max(widths(terminal.shown.replace(str(tmp_path), ""))) <= 80  # a longer path is a line of its own
    words = f"saved to {tmp_path}/out: try weft generate {tmp_path}/out --prompt '...'"
    assert words in re.sub(r"\s+", " ", terminal.shown)
    for line in re.split(r"step \d/2  loss ", terminal.shown)[1:]:
        assert len(re.findall(r"  expert-of-the-long-name-\d+ \d+%", line)) == 7
        assert re.search(r"  5 others \d+%", line)


@pytest.mark.parametrize("command", ["eval", "inspect"])
def test_tables_fit_and_no_name_or_number_is_broken(command, many):
    folder, data = many
    options = ["--rows", "base", "experts", "weft"] if command == "eval" else []
    terminal = run(command, folder, "--data", *data, *options)
    assert max(widths(terminal.shown)) <= 80
    for name in [f"expert-of-the-long-name-{number}" for number in range(12)] + [f"data-set-{n}" for n in range(6)]:
        assert re.search(rf"{name}\b", terminal.shown)
    if command == "eval":
        assert len(re.findall(r"\d+\.\d\d ±\d+\.\d\d", terminal.shown)) == 14 * 6


def test_a_download_shows_how_far_it_is(mixture, hub, tmp_path):
    shutil.copytree(mixture, hub / "user" / "mix")
    address = {"HF_ENDPOINT": huggingface_hub.constants.ENDPOINT, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    address["HF_HOME"] = str(tmp_path / "home")
    terminal = run("pull", "user/mix", "--output", str(tmp_path / "pulled"), **address)
    assert re.search(r"\d+%\|", terminal.shown)
    again = run("--quiet", "pull", "user/mix", "--output", str(tmp_path / "again"), **address)
    assert not re.search(r"\d+%\|", again.shown)


def test_the_line_of_a_chat_can_be_edited_and_earlier_ones_come_again(mixture):
    pytest.importorskip("readline")
    with Terminal("-m", "weft", "chat", mixture, "--max-new-tokens", "6") as chat:
        chat.wait_for("/help lists the commands, Ctrl-C stops an answer\r\n(.*\n)*.*> $")
        chat.type("/hlp\x1b[D\x1b[De\n")  # two to the left
        assert "/reset    forget" in chat.wait_for(r"as text\r\n(.|\n)*> $")
        chat.type("hi\n")
        chat.wait_for(r"hi\r\n(.|\n)*\n(.|\n)*> $")
        chat.type("\x1b[A\n")  # the line before
        assert "hi" in chat.wait_for(r"hi(.|\n)*\n(.|\n)*\n(.|\n)*> $")
        chat.type("/exprts\n")
        assert "'/exprts' is no command: did you mean /experts?" in chat.wait_for("as text")
        chat.type("/quit\n")
        assert chat.end() == 0
        assert "^[[" not in chat.shown

"""What `--help` prints is what tests/cli/help/ has, on a terminal of 80 columns and in a pipe."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weft.cli import main
from weft.cli.commands import COMMANDS, GROUPS
from weft.cli.help import command_help, overview
from weft.options.described import options_of

FOLDER = Path(__file__).parent / "help"
RENEW = "WEFT_RENEW_HELP"
NAMES = ["weft", *COMMANDS]


def shown(name, width=80):
    return f"{overview(width) if name == 'weft' else command_help(name, width)}\n"


def compare(text, file):
    """Compare with a snapshot, or write it where the environment asks for that."""
    if os.environ.get(RENEW):
        file.write_text(text)
    assert text == file.read_text(), f"{file.name} is renewed by: {RENEW}=1 pytest tests/cli/test_help.py"


@pytest.mark.parametrize("name", NAMES)
def test_help_is_as_it_was(name):
    compare(shown(name), FOLDER / f"{name}.txt")


def test_snapshots_are_renewed_on_demand(tmp_path, monkeypatch):
    monkeypatch.delenv(RENEW, raising=False)
    file = tmp_path / "weft.txt"
    file.write_text("as it was")
    with pytest.raises(AssertionError, match=r"weft.txt is renewed by: WEFT_RENEW_HELP=1 pytest"):
        compare(shown("weft"), file)
    monkeypatch.setenv(RENEW, "1")
    compare(shown("weft"), file)
    assert file.read_text() == shown("weft")


def test_there_is_a_snapshot_of_each_command_and_no_other():
    assert {file.stem for file in FOLDER.iterdir()} == set(NAMES)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("name", NAMES)
def test_lines_fit_on_the_screen(name, width):
    for line in shown(name, width).splitlines():
        assert len(line) < width or len(line.split()) <= 3, line  # what a person types is not divided


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_group_and_a_sentence(name):
    options = options_of(COMMANDS[name].options)
    assert {option.name for option in options} == {field.name for field in dataclasses.fields(COMMANDS[name].options)}
    for option in options:
        assert option.group or option.positional, option.name
        assert option.sentence.endswith("."), option.name
        assert option.sentence[0].isupper(), option.name
        assert len(option.sentence) <= 120, option.name
    groups = [option.group for option in options]
    assert len(list(dict.fromkeys(groups))) == sum(a != b for a, b in zip(["-", *groups], groups, strict=False))


@pytest.mark.parametrize("name", ["weft", "train"])
def test_a_pipe_gets_the_same_without_torch(name):
    code = "import sys; from weft.cli import main\ncode = main(sys.argv[1:])\nprint('torch' in sys.modules, code)"
    command = [sys.executable, "-c", code, *([] if name == "weft" else [name]), "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert found.stdout == (FOLDER / f"{name}.txt").read_text() + "False 0\n"
    assert found.stderr == ""


def test_the_table_of_commands_can_be_read_where_nothing_else_is_installed():
    """The site's reference is made from it, in an environment of its own."""
    code = "import sys; import weft.cli.commands; print(*sorted({'torch', 'safetensors', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_of_80_columns_shows_the_same():
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "weft", "generate", "--help"], stdout=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # of the end
        while part := os.read(ours, 4096):
            text += part
    os.close(ours)
    assert process.wait() == 0
    assert text.decode().replace("\r\n", "\n") == (FOLDER / "generate.txt").read_text()


def test_without_a_command_there_is_the_overview_and_an_exit_code_of_wrong_usage(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 2
    assert capsys.readouterr().out == (FOLDER / "weft.txt").read_text()
    assert main(["-h"]) == 0
    assert main(["train", "--base", "x", "-h"]) == 0
    assert capsys.readouterr().out.endswith((FOLDER / "train.txt").read_text())

"""What other libraries say that nobody can act on is hidden, unless it is asked for; what else they say is not."""

import logging
import subprocess
import sys
import warnings

import pytest

import weft
from models import tiny_llama
from weft.screen.libraries import libraries_hushed
from weft.screen.loudness import NORMAL, QUIET, VERBOSE, is_quiet, is_verbose, loudness
from weft.screen.visible import notice

LINES = {
    "torchao": ("Failed to load /x/_C.so: no such symbol", "Skipping import of cpp extensions due to a torch"),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community: none",),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported by torch.compile",),
}


@pytest.mark.parametrize("name", LINES)
def test_their_notices_are_hidden_and_nothing_else(name, caplog):
    logger = logging.getLogger(name)
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


def test_importing_peft_after_weft_says_nothing():
    ran = subprocess.run(
        [sys.executable, "-c", "import weft, peft.tuners.lora"], capture_output=True, text=True, check=True
    )
    assert (ran.stdout, ran.stderr) == ("", "")

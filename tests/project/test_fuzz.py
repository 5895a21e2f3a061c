"""The fuzzer for some minutes: nothing raw, nothing wrong, nothing written outside, no input changed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_hostile_folders_options_and_data_are_right_or_refused():
    # In a process of its own: it limits its memory, and gives up the superuser's rights.
    command = [sys.executable, "-m", "fuzz", "--seed", "14", "--seconds", "150"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert int(ran.stdout.splitlines()[-1].split()[0]) > 500  # cases


@pytest.mark.slow
def test_a_case_can_be_tried_again_alone():
    command = [sys.executable, "-m", "fuzz", "--seed", "14", "--case", "3", "--kind", "options"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    one, other = (
        subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False).stdout
        for _ in range(2)
    )
    assert one == other
    assert one.startswith("seed 14 case 3 options [")

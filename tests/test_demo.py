"""The demo runs from nothing to a generated text, and a second run reuses what is done."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_runs_and_runs_again(tmp_path):
    command = [sys.executable, str(ROOT / "demo/run.py"), "--quick", "--work-dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    rows = json.loads((tmp_path / "quick/eval.json").read_text())["perplexity"]
    experts = ["python", "reference", "licences", "records"]
    assert list(rows) == ["base", *(f"only {name}" for name in experts), "uniform mix", "weft", "oracle"]
    assert set(rows["weft"]) == set(rows["oracle"]) == {*experts, "mixed"}
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0
    assert "weft train" not in again.stdout
    assert "weft generate" in again.stdout

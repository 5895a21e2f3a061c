"""mistral.rs writes weft's text from what `weft convert --to mistralrs` gives it; where the engine is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINE = ROOT / ".bench/mistralrs/venv/bin/python"


@pytest.mark.slow
@pytest.mark.skipif(not ENGINE.exists(), reason="needs the engine: benchmarks/mistralrs_decode.py installs it")
def test_the_engine_writes_the_same_text():
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "benchmarks/mistralrs_equal.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert {kind: said for kind, said in results.items() if not said.startswith("the same text")} == {}

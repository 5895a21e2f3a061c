"""The ablation of the gate runs from experts to a table, on a tiny model, and goes on where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from models import lora, save_adapter

ROOT = Path(__file__).parents[2]
DOMAINS = ("python", "reference", "licences", "records")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.slow
def test_the_ablation_runs_and_runs_again(base_folder, tmp_path):
    demo = tmp_path / "demo"
    for number, domain in enumerate(DOMAINS):
        base = transformers.AutoModelForCausalLM.from_pretrained(base_folder)
        save_adapter(base, lora(r=2, target_modules=PROJECTIONS), demo / "experts" / domain, seed=number)
    (demo / "model").symlink_to(base_folder)
    for part in ("train", "heldout"):
        (demo / "data" / part).mkdir(parents=True)
        for name in (*DOMAINS, "mixed"):
            rows = [{"text": f"{name} {part} {number} and on", "experts": [[0, "python"]]} for number in range(4)]
            (demo / "data" / part / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    command = [
        sys.executable,
        str(ROOT / "benchmarks/ablation.py"),
        "--demo",
        str(demo),
        "--work",
        str(tmp_path / "work"),
    ]
    command += ["--results", str(tmp_path), "--steps", "1", "--seeds", "1", "--sequences", "2", "--only"]
    command += [
        "two passes",
        "neutral start",
        "start from prototypes",
        "start from domain means",
        "one LoRA",
        "--rates",
        "1e-3",
        "1e-2",
        "--label",
        "tiny",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 0, first.stdout + first.stderr
    (file,) = tmp_path.glob("*-ablation-tiny-1-steps.json")
    rows = json.loads(file.read_text())["perplexity"]
    assert {"two passes #0", "start from prototypes, untrained #0", "merge ties", "arrow", "oracle"} <= set(rows)
    assert rows["neutral start, untrained #0"]["test"] == pytest.approx(rows["uniform mix"]["test"], rel=1e-5)
    assert sum(row.startswith("one LoRA of rank") for row in rows) == 2
    again = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert again.returncode == 0
    assert "trained to step" not in again.stdout
    assert json.loads(file.read_text())["perplexity"] == rows

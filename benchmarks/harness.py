"""Measuring: interleaved medians of time, and peak memory of this process. Linux only (`/proc`)."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def interleaved(contenders: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each contender; every round runs all of them, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(-warm_up, rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if round_number >= 0:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(run: Callable[[], Any]) -> float:
    """MB of resident memory that `run` needs at its peak, above what is held before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory that the process still holds hides what `run` takes
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match.group(1))


def seconds_of(command: list[str], rounds: int = 5) -> float:
    """Median seconds of a process."""
    return interleaved({"": lambda: subprocess.run(command, check=True, capture_output=True)}, rounds)[""]


def setting() -> dict[str, Any]:
    """What a result depends on: date, commit, machine, versions."""
    import peft
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    model_name = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": model_name.group(1) if model_name else platform.processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def save(name: str, result: dict[str, Any], table: str) -> None:
    """Write a dated JSON file and its table, and print both; the JSON line comes last."""
    RESULTS.mkdir(exist_ok=True)
    stem = f"{result['setting']['date']}-{name}"
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    (RESULTS / f"{stem}.md").write_text(table, encoding="utf-8")
    print(table)
    print(json.dumps(result))


def slug(name: str) -> str:
    """A variant's name as a folder's."""
    return "".join(letter if letter.isalnum() or letter in ".=-" else "-" for letter in name)

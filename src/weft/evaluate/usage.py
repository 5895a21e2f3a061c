"""The time and peak memory of a block of code."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Usage:
    """Time in seconds, and peak memory of the process or the GPU in MB; None if it cannot be measured."""

    seconds: float = 0.0
    peak_mb: float | None = None


@contextmanager
def measured(device: torch.device) -> Iterator[Usage]:
    """Measure the `Usage` of the block, which is complete at its end."""
    usage = Usage()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    resettable = not on_gpu and _reset_peak()
    start = time.perf_counter()
    yield usage
    if on_gpu:
        torch.cuda.synchronize(device)
        usage.peak_mb = torch.cuda.max_memory_allocated(device) / 2**20
    elif resettable:
        usage.peak_mb = _resident_peak()
    usage.seconds = time.perf_counter() - start


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:  # not Linux, or no permission
        return False
    return True


def _resident_peak() -> float | None:
    found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
    return int(found.group(1)) / 1024 if found else None

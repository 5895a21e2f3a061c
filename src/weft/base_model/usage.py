"""The time and peak memory of a block of code."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

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
    peak = peak_memory(device) if on_gpu or resettable else None
    usage.peak_mb = None if peak is None else peak / 2**20
    usage.seconds = time.perf_counter() - start


def _reset_peak() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:  # not Linux, or no permission
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: of the process, or on a GPU of its tensors; None if it cannot be measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    if _STATUS.exists():  # Linux, where `measured` can reset the peak
        found = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text())
        return int(found.group(1)) * 2**10 if found else None
    if resource is None:
        return None
    # In kilobytes, but for macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)

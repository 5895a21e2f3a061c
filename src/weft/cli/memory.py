"""The message for out of memory: what failed, how much memory there is, and which options of the command need less."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from weft.errors import WeftError, lack_of_memory, memory_limit
from weft.options.base import CommandOptions
from weft.screen.countdown import size

_WANTED = re.compile(r"(?:allocate|mmap) ([\d.]+) ?(bytes|[KMGT]iB)")
_ON_GPU = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+) ?(bytes|[KMGT]iB)")
_FREE_ON_GPU = re.compile(r"of which ([\d.]+) ?(bytes|[KMGT]iB) is free")
_OF_A_DEVICE = re.compile("out of memory|ALLOC_FAILED", re.IGNORECASE)  # not the memory of the process
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_LOADER = re.compile(r"\S+: failed to map segment from shared object")
# weft's errors begin with what failed: base (x) cannot be loaded: ...
_WHAT_FAILED = re.compile(r"(.*? cannot be (?:loaded|read))\b")
_MORE = "End other programs, or use a machine with more memory"
_INFO = Path("/proc/meminfo")  # Linux


def memory_error(err: Exception, options: CommandOptions, *, importing: bool = False) -> WeftError | None:
    """The error to report if there was not enough memory; None for other errors.

    Args:
        err: the error that ended the command.
        options: the options of the command.
        importing: the command was still importing its libraries.
    """
    lack = lack_of_memory(err)
    if lack is None:
        return None
    text = str(lack)
    if importing or isinstance(lack, ImportError):
        # A file system that is mounted noexec gives the same error, so the loader's words are shown.
        loader = _LOADER.search(text)
        facts = [loader[0] if loader else "", _of_this_process()]
        return _error(" to load torch, transformers and peft", facts, less_memory(None))
    wanted, gpu, free = _WANTED.search(text), _ON_GPU.search(text), _FREE_ON_GPU.search(text)
    where = f" on {gpu[1]}, which has {_size(gpu[2], gpu[3])}" if gpu else ""
    failed = _WHAT_FAILED.match(str(err)) if isinstance(err, WeftError) else None
    facts = [
        failed[1] if failed else "",
        f"an allocation of {_size(wanted[1], wanted[2])} failed" if wanted else "",
        f"{_size(free[1], free[2])} are free" if free else "" if _OF_A_DEVICE.search(text) else _of_this_process(),
    ]
    return _error(where, facts, less_memory(options, loading=isinstance(err, WeftError)))


def _error(what: str, facts: list[str], advice: str) -> WeftError:
    known = "; ".join(filter(None, facts))
    return WeftError(f"there is not enough memory{what}{f': {known}' if known else ''}. {advice}")


def _of_this_process() -> str:
    """The limit of this process's memory, or what is available; "" if neither is known."""
    limit = memory_limit()
    if limit is not None:
        return f"this process is limited to {size(limit)} (ulimit -v)"
    found = re.search(r"MemAvailable:\s+(\d+) kB", _INFO.read_text()) if _INFO.exists() else None
    return f"{size(int(found[1]) * 2**10)} are available" if found else ""


def less_memory(options: Any, *, loading: bool = False) -> str:
    """A sentence with the options that reduce the memory.

    Args:
        options: the options of the command; those that cannot be lowered further are left out.
        loading: memory ran out while a model was loaded, so options of the computation do not help.
    """
    ways = []
    if not loading:
        for name, smallest in (("batch_size", 1), ("sequence_length", 2)):
            if getattr(options, name, smallest) > smallest:
                ways.append(f"a smaller {_flag(name)} ({getattr(options, name)})")
        if not hasattr(options, "batch_size") and hasattr(options, "max_new_tokens"):
            ways.append(f"a smaller --max-new-tokens ({options.max_new_tokens})")
        if getattr(options, "gradient_checkpointing", None) is False:
            ways.append("--gradient-checkpointing")
        if hasattr(options, "gate_layer") and options.gate_layer is None and options.start_from is None:
            ways.append("--gate-layer N")
    if getattr(options, "dtype", None) in ("auto", "float32"):
        ways.append("--dtype bfloat16")
    if hasattr(options, "quantization") and options.quantization is None:
        ways.append("--quantization nf4")
    if not ways:
        return _MORE if memory_limit() is None else "Raise the limit"
    return f"Less is needed with {', or '.join([', '.join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _size(number: str, unit: str) -> str:
    return size(float(number) * _UNITS[unit])

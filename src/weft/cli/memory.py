"""The message for out of memory: how much was needed, and which options of the command need less."""

from __future__ import annotations

import re
from typing import Any

from weft.errors import WeftError, first_line, lack_of_memory
from weft.options.base import CommandOptions
from weft.screen.countdown import size

_WANTED = re.compile(r"(?:allocate|mmap) ([\d.]+) ?(bytes|[KMGT]iB)")
_ON_GPU = re.compile(r"(GPU \d+) has a total capacity of ([\d.]+) ?(bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def memory_error(err: Exception, options: CommandOptions) -> WeftError | None:
    """The error to report if there was not enough memory; None for other errors.

    Args:
        err: the error that ended the command.
        options: the options of the command.
    """
    lack = lack_of_memory(err)
    if lack is None:
        return None
    text = str(lack)
    wanted, gpu = _WANTED.search(text), _ON_GPU.search(text)
    more = f": {_size(wanted[1], wanted[2])} more were needed" if wanted else ""
    where = f" on {gpu[1]}, which has {_size(gpu[2], gpu[3])}" if gpu else ""
    # weft's errors begin with what failed: base (x) cannot be loaded: ...
    during = f" ({first_line(err).partition(':')[0]})" if isinstance(err, WeftError) else ""
    advice = less_memory(options, loading=isinstance(err, WeftError))
    return WeftError(f"there is not enough memory{where}{more}{during}. {advice}")


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
        return "End other programs, or use a machine with more memory"
    return f"Less is needed with {', or '.join([', '.join(ways[:-1]), ways[-1]] if len(ways) > 1 else ways)}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _size(number: str, unit: str) -> str:
    return size(float(number) * _UNITS[unit])

"""Distributed training: the rank of this process, collective decisions, and sharded parameters."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError

_TIME_FOR_THREADS = 0.2  # seconds


def number_of_processes() -> int:
    """The number of processes that train together, from the launcher's WORLD_SIZE; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """The rank of this process, from the launcher's RANK. Rank 0 prints and writes the files."""
    return int(os.environ.get("RANK", "0"))


def by_the_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` in the process of rank 0, and a function that does nothing in the others."""
    return say if process_number() == 0 else lambda line: None


def in_distributed_training() -> bool:
    """Whether torch.distributed is initialised, so that a wrapper (DDP, FSDP, ZeRO) may manage the parameters."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sharding_is_to_come() -> bool:
    """Whether accelerate was launched to shard models, with FSDP or DeepSpeed."""
    return _is_to_come("FSDP") or deepspeed_is_to_come()


def deepspeed_is_to_come() -> bool:
    """Whether accelerate was launched to train with DeepSpeed."""
    return _is_to_come("DEEPSPEED")


def _is_to_come(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1")


def parameters_may_be_wrapped() -> bool:
    """Whether a wrapper (DDP, FSDP, ZeRO) may hold references to the parameters' storage, now or later.

    Such storage must not be replaced.
    """
    return in_distributed_training() or sharding_is_to_come()


def is_sharded(parameter: Any) -> bool:
    """Whether this process has only a shard of the tensor: a DTensor of FSDP, or an empty parameter of ZeRO-3."""
    return hasattr(parameter, "full_tensor") or (isinstance(parameter, Tensor) and parameter.numel() == 0)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is True in any process. A collective call: all processes must make it at the same point.

    Args:
        flag: this process's flag.
        device: this process's device.
    """
    if not in_distributed_training():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def from_all_processes(value: Any) -> list[Any]:
    """The values of all processes, in the order of rank. A collective call."""
    if not in_distributed_training():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def fail_together(error: WeftError | None, device: torch.device) -> None:
    """Raise in all processes if any process has an error, so that none waits for it. A collective call.

    Args:
        error: this process's error, or None.
        device: this process's device.

    Raises:
        WeftError: this process's error, or one with the message of the first process that has an error.
    """
    if not any_process(error is not None, device):
        return
    errors = from_all_processes(None if error is None else (type(error), str(error)))
    kind, text = next(each for each in errors if each is not None)
    shared = kind(text) if error is None else error
    shared.in_all_processes = True
    raise shared


def leave_group_at_exit() -> None:
    """Destroy the process group when the interpreter ends. To be called where no process is in a collective call.

    gloo's threads free the tensors of the last call after that call has returned, and need the GIL for it. A thread
    that waits for the GIL when the interpreter ends makes the process end with SIGABRT. FSDP keeps references to its
    groups, so that destroying them does not join those threads: they are given time instead.
    """
    atexit.register(_leave_group)


def _leave_group() -> None:
    if in_distributed_training():
        torch.distributed.destroy_process_group()
        time.sleep(_TIME_FOR_THREADS)

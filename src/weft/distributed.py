"""Several processes that train together: which one this is, what they agree on, and who has the parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weft.errors import WeftError


def number_of_processes() -> int:
    """How many processes train together, as their launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_number() -> int:
    """Which of them this is, as their launcher says; the first one, 0, speaks for all and writes the files."""
    return int(os.environ.get("RANK", "0"))


def by_the_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """What says a line in the first process, and nothing in the others."""
    return say if process_number() == 0 else lambda line: None


def in_distributed_training() -> bool:
    """Whether this process is one of several that train together, so that others may look after the parameters."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sharding_is_to_come() -> bool:
    """Whether accelerate was launched to shard models, with FSDP or DeepSpeed."""
    return _is_to_come("FSDP") or deepspeed_is_to_come()


def deepspeed_is_to_come() -> bool:
    """Whether accelerate was launched to train with DeepSpeed."""
    return _is_to_come("DEEPSPEED")


def _is_to_come(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1")


def others_have_parameters() -> bool:
    """Whether a parameter's new storage may be that of somebody who needs it to stay."""
    return in_distributed_training() or sharding_is_to_come()


def is_sharded(parameter: Any) -> bool:
    """Whether the whole of this tensor is spread over several processes: a shard of FSDP's, or empty with ZeRO-3."""
    return hasattr(parameter, "full_tensor") or (isinstance(parameter, Tensor) and parameter.numel() == 0)


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any of the processes, which all ask this at the same point; `device` is this one's."""
    if not in_distributed_training():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def from_all_processes(value: Any) -> list[Any]:
    """What each process has, in their order; all ask this at the same point."""
    if not in_distributed_training():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def fail_together(error: WeftError | None, device: torch.device) -> None:
    """Raise in all processes where one has an error, so that none waits for it; all call this at the same point.

    Args:
        error: this process's, or None.
        device: this process's.

    Raises:
        WeftError: this process's error, or what the first process that has one says.
    """
    if not any_process(error is not None, device):
        return
    errors = from_all_processes(None if error is None else (type(error), str(error)))
    kind, text = next(each for each in errors if each is not None)
    shared = kind(text) if error is None else error
    shared.in_all_processes = True
    raise shared

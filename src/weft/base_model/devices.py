"""The device on which each part of the model runs, and experts and gate that stay there.

With offloading (`device_map`), accelerate keeps a module's weights elsewhere and loads them only during its forward;
between forwards the parameters are on the meta device. A stack of experts has no forward of its own and is small, so
it stays on the device of its layer.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch import Tensor, nn

# The names of the cache argument in transformers: "cache" since 5.24, "cache_params" in Mamba and similar models.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


def execution_device(module: nn.Module) -> torch.device:
    """The device of a module's first weights while it runs; the CPU if it has no weights."""
    for part in module.modules():
        device = _hooks_device(part)
        if device is not None:
            return device
        # Some quantised layers have only buffers.
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def where_it_starts(base: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Move a call's arguments to the device to which accelerate's hook on the base model would move them.

    The hook does not run if only a part of the model is called.
    """
    device = _hooks_device(base)
    return arguments if device is None else send_to_device(arguments, device, skip_keys=list(CACHE_NAMES))


def memory_of(device: torch.device) -> int | None:
    """The total memory of a device in bytes; None if it cannot be found out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size if pages > 0 else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate offloads this module's own weights between its forwards."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def offloaded_weights(module: nn.Module) -> dict[str, Tensor]:
    """A module's own weights if they are offloaded, else an empty dict."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            return {name: hook.weights_map[name] for name in names}
    return {}


def resident_device(module: nn.Module) -> torch.device:
    """The device of a module's weights. Offloaded weights are first loaded, and stay loaded."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    device = execution_device(module)
    keep_resident(module, device)
    return device


def keep_resident(module: nn.Module, device: torch.device) -> None:
    """Load a module's offloaded weights to `device` and remove accelerate's hooks, so that they stay there."""
    for part in module.modules():
        weights = offloaded_weights(part)
        if not weights:
            continue
        remove_hook_from_module(part)
        for name, parameter in list(part.named_parameters(recurse=False)):
            value = weights[name].to(device=device, dtype=parameter.dtype, copy=True)
            part.register_parameter(name, nn.Parameter(value, requires_grad=parameter.requires_grad))


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _hooks_device(module: nn.Module) -> torch.device | None:
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None

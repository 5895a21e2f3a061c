"""On which device a part of the model computes, and that experts and gate stay there.

Under `device_map` with offload, accelerate keeps a module's weights elsewhere (a placeholder on the meta device stands
in their place) and brings them for the time of its forward. A stack of experts has no forward of its own, and is
small: it stays on the device where the layer around it computes.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import send_to_device
from torch import Tensor, nn

# The arguments by which models of transformers take their cache; the second is that of Mamba and its kin.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # the first one since transformers 5.24


def execution_device(module: nn.Module) -> torch.device:
    """Where a module's first weights are when it runs; the CPU where it has none."""
    for part in module.modules():
        device = _hooks_device(part)
        if device is not None:
            return device
        # Some quantised layers have buffers only.
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if not tensor.is_meta:
                return tensor.device
    return torch.device("cpu")


def where_it_starts(base: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments on the device where accelerate's hook on the base model would bring them.

    What runs a part of the model by itself goes past that hook.
    """
    device = _hooks_device(base)
    return arguments if device is None else send_to_device(arguments, device, skip_keys=list(CACHE_NAMES))


def memory_of(device: torch.device) -> int | None:
    """How many bytes of memory a device has, used or not; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return pages * size if pages > 0 else None


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps this module's own weights elsewhere between its forwards."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def offloaded_weights(module: nn.Module) -> dict[str, Tensor]:
    """Where they are offloaded, a module's own weights; empty where they are not."""
    names = [name for name, _ in module.named_parameters(recurse=False)]
    for hook in _hooks(module):
        if getattr(hook, "offload", False):
            return {name: hook.weights_map[name] for name in names}
    return {}


def resident_device(module: nn.Module) -> torch.device:
    """The device of a module's weights, which are brought back where they are offloaded."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    device = execution_device(module)
    keep_resident(module, device)
    return device


def keep_resident(module: nn.Module, device: torch.device) -> None:
    """Undo the offload of a module that was put under accelerate's hooks: its weights come to `device` and stay."""
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

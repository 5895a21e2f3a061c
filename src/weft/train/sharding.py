"""Converts weights and the optimizer's state between FSDP's shards and files for any number of processes.

transformers' Trainer writes checkpoints of shards that only FSDP can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.distributed import is_sharded


def gathered_state(optimizer: Any) -> dict[str, Any]:
    """An optimizer's state dict, gathered on the CPU. All processes must call this."""
    state: dict[str, Any] = optimizer.state_dict()
    state["state"] = {
        number: {name: value.full_tensor().cpu() if is_sharded(value) else value for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return state


def load_gathered_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load a state dict of `gathered_state` into an optimizer, sharded like its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        number: {name: _like(parameters[number], value) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict(state)


@torch.no_grad()
def load_weights(model: Any, tensors: dict[str, Tensor]) -> None:
    """Load the weights of a saved adapter into a sharded model. Other weights are not changed."""
    of_heads = f".modules_to_save.{model.active_adapter}."
    for name, parameter in model.named_parameters():
        saved = tensors.get(name.replace(of_heads, "."))
        if saved is not None:
            parameter.copy_(_like(parameter, saved))


def lay_out_as_parameters(optimizer: Any) -> None:
    """Give the optimizer's tensors the strides of their parameters, as fused AdamW requires.

    Stacked experts have transposed strides; tensors of FSDP's checkpoints do not.
    """
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _like(parameter: Any, value: Any) -> Any:
    """Shard a tensor of a parameter's shape like the parameter. Other values are returned unchanged."""
    if not isinstance(value, Tensor) or not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)

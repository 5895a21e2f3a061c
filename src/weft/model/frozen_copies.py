"""Frozen copies of a mixture, as the reference model of preference training.

TRL's trainers (DPO, KTO, RLOO, GRPO) add an adapter "ref" with the options of the trained adapter, and activate it to
compute the reference's log-likelihoods. Here it is a copy of the gate and the heads, and of the experts if these are
trained; frozen experts are shared. A copy is never trained, has no dropout, and is not saved: a new run from the same
mixture makes the same copy again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from weft.errors import ConfigError
from weft.model.heads import wrappers
from weft.model.inject import containers, lora_layers


class FrozenCopy(nn.Module):
    """A frozen copy of a gate.

    Args:
        gate: the gate to copy.
        experts: the names of its experts, in the order of its outputs.
    """

    def __init__(self, gate: nn.Module, experts: Iterable[str]) -> None:
        super().__init__()
        self.gate = copy.deepcopy(gate).requires_grad_(False)
        self.experts = list(experts)
        self.eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in evaluation mode, as a reference has no dropout."""
        return super().train(False)


def refuse_frozen_copy(model: Any, name: str) -> None:
    """Raise if adapter `name` of a PeftModel is a frozen copy, which is neither loaded nor saved.

    Raises:
        ConfigError: it is a frozen copy.
    """
    if name in model.base_model.frozen_copies:
        raise ConfigError(
            f"adapter {name!r} is a frozen copy of the mixture, which is neither loaded nor saved: add_adapter makes "
            "it again, from the mixture as it is then"
        )


def refuse_loading_into_copy(tuner: Any, state_dict: dict[str, Any], *others: Any) -> None:
    """A hook that runs before a state dict is loaded: raise if a frozen copy is active.

    Raises:
        ConfigError: a frozen copy is active.
    """
    if tuner.active_adapter in tuner.frozen_copies:
        raise ConfigError(
            f"adapter {tuner.active_adapter!r} is a frozen copy of the mixture, into which nothing is loaded: switch "
            f"to the mixture with set_adapter({tuner.mixture_name!r})"
        )


def copy_experts(base: nn.Module, names: Iterable[str], prefix: str) -> list[str]:
    """Make frozen copies of experts in each LoRA layer.

    Args:
        base: the base model with its LoRA layers.
        names: the experts.
        prefix: prefix of the copies' names.

    Returns:
        The copies' names.

    Raises:
        ConfigError: an adapter has such a name already.
    """
    copies = {name: f"{prefix}-{name}" for name in names}
    layers = [layer for _, layer in lora_layers(base)]
    for layer in layers:
        for container in containers(layer):
            taken = set(container) & set(copies.values())
            if taken:
                raise ConfigError(f"adapter_name ({prefix!r}) would copy an expert to {taken.pop()!r}, which is there")
    for layer in layers:
        for container in containers(layer):
            for name, twin in copies.items():
                if name in container:
                    dropout = container is layer.lora_dropout
                    container[twin] = nn.Identity() if dropout else copy.deepcopy(container[name])
                    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
                        container[twin].requires_grad_(False)
    return list(copies.values())


def remove_experts(base: nn.Module, names: Iterable[str]) -> None:
    """Remove adapters from each LoRA layer."""
    for _, layer in lora_layers(base):
        for container in containers(layer):
            for name in names:
                if name in container:
                    del container[name]


def activate_experts(base: nn.Module, names: list[str]) -> None:
    """Activate these adapters in each LoRA layer, without a change of `requires_grad`."""
    for _, layer in lora_layers(base):
        layer._active_adapter = list(names)


def copy_heads(base: nn.Module, mixture: str, name: str) -> None:
    """Make frozen copies of the mixture's heads."""
    for _, wrapper in wrappers(base):
        wrapper.modules_to_save[name] = copy.deepcopy(wrapper.modules_to_save[mixture]).requires_grad_(False)


def remove_heads(base: nn.Module, name: str) -> None:
    """Remove a copy of the heads."""
    for _, wrapper in wrappers(base):
        del wrapper.modules_to_save[name]


def activate_heads(base: nn.Module, name: str) -> None:
    """Activate these heads, without a change of `requires_grad`."""
    for _, wrapper in wrappers(base):
        wrapper._active_adapter = [name]

"""Frozen copies of a mixture beside it: what preference training compares its progress with.

TRL's trainers (DPO, KTO, RLOO, GRPO) add an adapter "ref" with the options of the one that is trained, and switch to it
for the reference's likelihoods. Here that is a copy of the gate and the heads as they are then, and of the experts
where they train too; frozen experts are shared. A copy never trains, drops nothing, and is not saved: whoever starts
again from the same mixture makes the same copy again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from weft.base_model.versions import kept_by_name
from weft.errors import ConfigError
from weft.model.heads import wrappers


class FrozenCopy(nn.Module):
    """A gate that stays as it was when it was copied.

    Args:
        gate: which is copied.
        experts: the names of its experts, in the order of its outputs.
    """

    def __init__(self, gate: nn.Module, experts: Iterable[str]) -> None:
        super().__init__()
        self.gate = copy.deepcopy(gate).requires_grad_(False)
        self.experts = list(experts)
        self.eval()

    def train(self, mode: bool = True) -> FrozenCopy:
        """Stay in evaluation mode: a reference drops nothing."""
        return super().train(False)


def refuse_frozen_copy(model: Any, name: str) -> None:
    """Raise where tensors would be loaded into, or saved from, a frozen copy of a PeftModel's mixture.

    Raises:
        ConfigError: it is one.
    """
    if name in model.base_model.frozen_copies:
        raise ConfigError(
            f"adapter {name!r} is a frozen copy of the mixture, which is neither loaded nor saved: add_adapter makes "
            "it again, from the mixture as it is then"
        )


def refuse_loading_into_copy(tuner: Any, state_dict: dict[str, Any], *others: Any) -> None:
    """A hook for what loads an X-LoRA model's state: while a frozen copy acts, it must not go to the mixture itself.

    Raises:
        ConfigError: a copy acts.
    """
    if tuner.active_adapter in tuner.frozen_copies:
        raise ConfigError(
            f"adapter {tuner.active_adapter!r} is a frozen copy of the mixture, into which nothing is loaded: switch "
            f"to the mixture with set_adapter({tuner.mixture_name!r})"
        )


def copy_experts(base: nn.Module, names: Iterable[str], prefix: str) -> list[str]:
    """Copy experts in every LoRA layer that has them; the copies are frozen.

    Args:
        base: the base model with its LoRA layers.
        names: of the experts.
        prefix: with which their copies' names begin.

    Returns:
        The copies' names.

    Raises:
        ConfigError: an adapter has such a name already.
    """
    copies = {name: f"{prefix}-{name}" for name in names}
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        for container in _containers(layer):
            taken = set(container) & set(copies.values())
            if taken:
                raise ConfigError(f"adapter_name ({prefix!r}) would copy an expert to {taken.pop()!r}, which is there")
    for layer in layers:
        for container in _containers(layer):
            for name, twin in copies.items():
                if name in container:
                    dropout = container is layer.lora_dropout
                    container[twin] = nn.Identity() if dropout else copy.deepcopy(container[name])
                    if isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
                        container[twin].requires_grad_(False)
    return list(copies.values())


def remove_experts(base: nn.Module, names: Iterable[str]) -> None:
    """Remove adapters from every LoRA layer."""
    for layer in base.modules():
        for container in _containers(layer) if isinstance(layer, LoraLayer) else ():
            for name in names:
                if name in container:
                    del container[name]


def activate_experts(base: nn.Module, names: list[str]) -> None:
    """Let these adapters act in every LoRA layer; what trains stays what it is."""
    for layer in base.modules():
        if isinstance(layer, LoraLayer):
            layer._active_adapter = list(names)


def copy_heads(base: nn.Module, mixture: str, name: str) -> None:
    """Copy the mixture's heads; the copies are frozen."""
    for _, wrapper in wrappers(base):
        wrapper.modules_to_save[name] = copy.deepcopy(wrapper.modules_to_save[mixture]).requires_grad_(False)


def remove_heads(base: nn.Module, name: str) -> None:
    """Remove a copy of the heads."""
    for _, wrapper in wrappers(base):
        del wrapper.modules_to_save[name]


def activate_heads(base: nn.Module, name: str) -> None:
    """Let these heads act; what trains stays what it is."""
    for _, wrapper in wrappers(base):
        wrapper._active_adapter = [name]


def _containers(layer: Any) -> list[Any]:
    """What a LoRA layer keeps by its adapters' names."""
    found = [getattr(layer, name) for name in kept_by_name(layer)]
    return [one for one in found if isinstance(one, (dict, nn.ModuleDict, nn.ParameterDict))]

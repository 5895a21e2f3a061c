"""Saves and restores what a mixture changes in a base model: flags, packed weights, hooks, modes.

No quantisation library is imported here: layers are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# The attribute of bitsandbytes' four-bit layers that allows repacking, on CPUs with bfloat16 instructions.
_MAY_REPACK = "support_avx512bf16_for_cpu"


class Flags:
    """The present `requires_grad` and training mode of a model's parameters and modules, to be restored later.

    Parameters and modules that are added later are not changed by `restore`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Restore `requires_grad` and the training mode."""
        self.restore_requires_grad(model)
        for name, module in model.named_modules():
            module.training = self._training.get(name, module.training)

    def restore_requires_grad(self, model: nn.Module) -> None:
        """Restore `requires_grad` only."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))


def keep_unpacked(base: nn.Module) -> list[nn.Module]:
    """Prevent bitsandbytes from repacking its four-bit weights for the CPU, and undo any repacking.

    On some CPUs, bitsandbytes repacks at the first forward in evaluation mode. Repacked layers have no backward, so the
    gate would get no gradients after an evaluation. In version 0.50, `state_dict()` of a repacked layer breaks it.

    Returns:
        The layers that were changed, for `let_repack`.
    """
    layers = []
    module: Any
    for module in base.modules():
        if getattr(module, _MAY_REPACK, False):
            setattr(module, _MAY_REPACK, False)
            layers.append(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the weights, but not their scales
            state = module.weight.quant_state
            if state.absmax.dim() == 2:
                state.absmax = state.absmax.T.reshape(-1).float()
    return layers


def let_repack(layers: list[nn.Module]) -> None:
    """Allow these layers to repack again."""
    for layer in layers:
        setattr(layer, _MAY_REPACK, True)


def input_gradient_hooks(base: Any) -> list[Any]:
    """The hooks that make the embeddings' output require gradients.

    peft adds one when it wraps a base model with gradient checkpointing.
    """
    return list(getattr(base, "_require_grads_hooks", None) or [])


def restore_input_gradient_hooks(base: Any, before: list[Any]) -> None:
    """Remove the hooks that are not in `before`."""
    added = [hook for hook in input_gradient_hooks(base) if hook not in before]
    for hook in added:
        hook.remove()
    if added:
        base._require_grads_hooks = before
        del base._require_grads_hook
        if before:
            base._require_grads_hook = before[0]


@contextmanager
def in_evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients in the block; afterwards each module has its former mode."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training

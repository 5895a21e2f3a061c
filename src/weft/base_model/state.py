"""What a mixture changes in a base model for a time, and how it is put back: flags, packed weights, hooks, modes.

Nothing here imports a library of quantisation: layers are known by what they have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Whether a four-bit layer of bitsandbytes may repack its weights, on CPUs with bfloat16 instructions.
_MAY_REPACK = "support_avx512bf16_for_cpu"


class Flags:
    """Which parameters of a model have gradients, and which modules are in training mode: as now, for later.

    What comes into the model after that keeps its own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._requires_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}

    def restore(self, model: nn.Module) -> None:
        """Put both back."""
        self.restore_requires_grad(model)
        for name, module in model.named_modules():
            module.training = self._training.get(name, module.training)

    def restore_requires_grad(self, model: nn.Module) -> None:
        """Put those of the parameters back."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))


def keep_unpacked(base: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from repacking its four-bit weights for the CPU, and undo what it has repacked.

    It would do so at the first forward in evaluation mode, on some CPUs. Repacked layers pass no gradient on, so that
    a gate evaluated once would learn nothing from then on, and reading their `state_dict()` spoils them (0.50).

    Returns:
        The layers that were kept from it, for `let_repack`.
    """
    layers = []
    module: Any
    for module in base.modules():
        if getattr(module, _MAY_REPACK, False):
            setattr(module, _MAY_REPACK, False)
            layers.append(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the layer, all but its scales
            state = module.weight.quant_state
            if state.absmax.dim() == 2:
                state.absmax = state.absmax.T.reshape(-1).float()
    return layers


def let_repack(layers: list[nn.Module]) -> None:
    """Let these layers be as they were."""
    for layer in layers:
        setattr(layer, _MAY_REPACK, True)


def input_gradient_hooks(base: Any) -> list[Any]:
    """The hooks that make the embeddings' output require gradients.

    peft adds one of its own when it wraps a base model that checkpoints its activations.
    """
    return list(getattr(base, "_require_grads_hooks", None) or [])


def restore_input_gradient_hooks(base: Any, before: list[Any]) -> None:
    """Remove the hooks that were added since."""
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
    """In this block nothing is dropped and nothing learns; afterwards each part has its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes.items():
            part.training = training

"""Gradient checkpointing that recomputes each block with the scalings of its original forward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.layers.carrier import ScalingsCarrier

Readers = dict[nn.Module, Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]]


class CheckpointedWithScalings:
    """A gradient checkpointing function that recomputes with the scalings of the original forward.

    The backward pass recomputes a block after its pass has ended, perhaps after further passes. So the block keeps its
    scalings. They are an explicit tensor argument, because reentrant checkpointing has gradients only for arguments.

    Args:
        checkpoint: the original checkpointing function.
        carrier: has the scalings.
        before: called before a block with its arguments, but not in the recomputation.
    """

    def __init__(
        self,
        checkpoint: Callable[..., Any],
        carrier: ScalingsCarrier,
        before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.carrier = carrier
        self.before = before

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(*args)`; the backward pass will recompute it with the present scalings."""
        if not torch.is_grad_enabled():
            return function(*args)  # the scaling pass has no backward
        if self.before is not None:
            self.before(args, getattr(function, "keywords", {}))
        routing = self.carrier.routing
        if routing is None:
            return self.checkpoint(self._plain, function, *args)

        def recomputable(scalings: Tensor, *inputs: Any) -> Any:
            with self.carrier.following(dataclasses.replace(routing, scalings=scalings)):
                return function(*inputs)

        return self.checkpoint(recomputable, routing.scalings, *args)

    def _plain(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.carrier.following(None):
            return function(*args)


def carry_through_checkpoints(base: nn.Module, carrier: ScalingsCarrier, readers: Readers | None = None) -> None:
    """Wrap the gradient checkpointing functions of a base model in `CheckpointedWithScalings`.

    This must be done in each call, because gradient checkpointing can be switched on at any time.

    Args:
        base: the model.
        carrier: has the scalings.
        readers: module -> the hook that runs the gate on the module's input. Before transformers 5.23 the hooks of a
            block are recomputed with it, and are not in the autograd graph, so this hook is called before the block.
    """
    module: Any
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointedWithScalings):
            reader = (readers or {}).get(module)
            before = None if reader is None else functools.partial(reader, module)
            module._gradient_checkpointing_func = CheckpointedWithScalings(function, carrier, before)


def undo_checkpoints(base: nn.Module) -> None:
    """Restore the original checkpointing functions of a base model."""
    module: Any
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointedWithScalings):
            module._gradient_checkpointing_func = function.checkpoint

"""Gradient checkpointing whose recomputation follows the scalings of its own forward."""

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
    """A gradient checkpointing function whose recomputation sees the scalings of its own forward.

    Backward recomputes a block long after its pass has ended, perhaps after another one; so the block takes its
    scalings with it. They travel as an explicit tensor argument, because reentrant checkpointing gives gradients to
    arguments only.

    Args:
        checkpoint: the function itself.
        carrier: has the scalings.
        before: called first with a block's arguments, and not in recomputation.
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
        """Run `function(*args)` so that backward can recompute it, with the scalings of now."""
        if not torch.is_grad_enabled():
            return function(*args)  # the scaling pass: there is nothing to recompute
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
    """Let what checkpoints its activations in a base model recompute them with the scalings of their own forward.

    At every call, because gradient checkpointing may be switched on, with plain functions, at any time.

    Args:
        base: the model.
        carrier: has the scalings.
        readers: by module, the hook by which a gate reads what enters it. Before transformers 5.23 a block's hooks are
            recomputed with it, and what they compute is not part of the graph: there it is called before the block.
    """
    module: Any
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and not isinstance(function, CheckpointedWithScalings):
            reader = (readers or {}).get(module)
            before = None if reader is None else functools.partial(reader, module)
            module._gradient_checkpointing_func = CheckpointedWithScalings(function, carrier, before)


def undo_checkpoints(base: nn.Module) -> None:
    """Give a base model its own checkpointing functions back."""
    module: Any
    for module in base.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, CheckpointedWithScalings):
            module._gradient_checkpointing_func = function.checkpoint

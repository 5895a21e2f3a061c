"""The two passes of every call: read the text for the gate, then run it with the experts mixed.

The **scaling pass** runs the backbone without a head (and, at the default `scaling_pass_value` of 0, without any LoRA
arithmetic); the gate turns its last hidden state into scalings λ. The **adapted pass** is the call itself, whose LoRA
layers mix the experts by λ. A pair of forward hooks on the base model, registered once, starts both; whoever calls the
base model (peft, `generate`, a Trainer) gets them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.backbone import Backbone
from weft.cache import XLoraCache, doubled, leave_scaling_behind
from weft.carrier import CheckpointedWithScalings, Routing, ScalingsCarrier
from weft.config import XLoraConfig
from weft.gate import XLoraClassifier
from weft.routing import keep_top_k
from weft.scalings_log import ScalingsLog


class TwoPasses:
    """Runs the scaling pass before each call of a base model and lets the layers follow its scalings.

    Args:
        backbone: of the base model.
        carrier: brings the scalings to the layers.
        gate: predicts the scalings.
        config: options, read at every call.
        output_layer: number of the LoRA layer that is the LM head, if it is adapted.

    Attributes:
        disabled: leave the experts out altogether.
        latest_scalings: of the last call, as the gate gave them.
        log: a record of them.
    """

    def __init__(
        self,
        backbone: Backbone,
        carrier: ScalingsCarrier,
        gate: XLoraClassifier,
        config: XLoraConfig,
        output_layer: int | None,
    ) -> None:
        self.backbone = backbone
        self.carrier = carrier
        self.gate = gate
        self.config = config
        self.output_layer = output_layer
        self.disabled = False
        self.latest_scalings: Tensor | None = None
        self.log = ScalingsLog(config.scalings_log_size)
        self._fixed: Tensor | None = None

    def attach(self, base: nn.Module) -> None:
        """Register the hooks, once."""
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, always_call=True)

    @staticmethod
    def detach(base: nn.Module) -> None:
        """Remove the hooks, and what gradient checkpointing was given, from a base model."""
        for hooks in (base._forward_pre_hooks, base._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), TwoPasses):
                    del hooks[key]
                    base._forward_pre_hooks_with_kwargs.pop(key, None)
                    base._forward_hooks_always_called.pop(key, None)
        module: Any
        for module in base.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, CheckpointedWithScalings):
                module._gradient_checkpointing_func = function.checkpoint

    @contextmanager
    def fixed_scalings(self, weights: Float[Tensor, " expert"]) -> Iterator[None]:
        """Use these weights for every token and layer, without a scaling pass, until the block ends."""
        # To the gate's device here, not in every layer at every call.
        before, self._fixed = self._fixed, weights.view(1, 1, 1, -1).to(self._device)
        try:
            yield
        finally:
            self._fixed = before

    def last_position(self) -> Float[Tensor, "batch layer expert"] | None:
        """What the layers followed at the last position of the last call, top-k applied.

        The layer axis is 1 where the scalings are fixed; None before the first call, and with the experts off.
        """
        if self.disabled:
            return None
        if self._fixed is not None:
            return self._fixed[:, -1]
        if self.latest_scalings is None:
            return None
        return self._kept(self.latest_scalings[:, -1])

    @property
    def _device(self) -> torch.device:
        return next(self.gate.parameters()).device

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.carrier.in_scaling_pass:
            return None
        arguments = self.backbone.named_arguments(args, kwargs)
        if self.disabled:
            leave_scaling_behind(arguments.get("past_key_values"))
            return None
        if getattr(base, "_is_replica", False):
            raise RuntimeError(
                "X-LoRA cannot run in torch.nn.DataParallel, whose threads would share one model's scalings: start one "
                "process per device (torchrun, accelerate launch), or show it a single one (CUDA_VISIBLE_DEVICES)"
            )
        self.carrier.clear()
        if torch.is_grad_enabled():
            self._carry_scalings_through_checkpoints(base)
        self.backbone.settle_cache(arguments)
        cache = arguments.get("past_key_values")
        if self._fixed is not None:
            leave_scaling_behind(cache)
            self.carrier.routing = Routing(self._fixed)
        else:
            self.latest_scalings = self._predict(arguments, None if cache is None else doubled(cache))
            self.log.record(self.latest_scalings)
            self.carrier.routing = self._routing(self.latest_scalings, arguments)
        return (), arguments

    def _after(self, base: nn.Module, args: Any, output: Any) -> None:
        if not self.carrier.in_scaling_pass:
            self.carrier.clear()

    def _predict(self, arguments: dict[str, Any], cache: XLoraCache | None) -> Float[Tensor, "batch seq layer expert"]:
        """The scaling pass and the gate: λ for the arguments of a call of the base model.

        The pass runs in the mode (training or evaluation) that the model is in, and without gradients: the gate is
        what learns.
        """
        value = self.config.scaling_pass_value
        constant = None
        if value != 0:
            # One position and one layer for all: every expert acts with the same weight everywhere.
            constant = Routing(torch.full((1, 1, 1, self.config.num_experts), float(value), device=self._device))
        with torch.no_grad(), self.carrier.scaling_pass(constant):
            hidden = self.backbone.last_hidden_state(arguments, None if cache is None else cache.scaling)
        return self.gate(hidden.to(self._device))

    def _routing(self, scalings: Tensor, arguments: dict[str, Any]) -> Routing:
        if not self.config.layerwise_scalings:
            scalings = scalings[:, :, :1]  # one computation for all layers
        padding = arguments.get("attention_mask")
        keep = arguments.get("logits_to_keep")
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else None
        return Routing(
            self._kept(scalings),
            padding=padding if isinstance(padding, Tensor) and padding.dim() == 2 else None,
            output_layer=self.output_layer,
            output_positions=keep,
        )

    def _kept(self, scalings: Float[Tensor, "*batch expert"]) -> Float[Tensor, "*batch expert"]:
        return keep_top_k(scalings, self.config.top_k_lora, renormalise=self.config.enable_softmax_topk)

    def _carry_scalings_through_checkpoints(self, base: nn.Module) -> None:
        # At every call, because gradient checkpointing may be switched on, with plain functions, at any time.
        module: Any
        for module in base.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, CheckpointedWithScalings):
                module._gradient_checkpointing_func = CheckpointedWithScalings(function, self.carrier)

    def __getstate__(self) -> dict[str, Any]:
        # The latest scalings are part of a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "latest_scalings": None}

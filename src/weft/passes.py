"""What happens around each call of a base model: who reads the text for the gate, and which scalings the layers follow.

Three schemes, chosen by the config:

- The paper's, and the default: a **scaling pass** runs the backbone without a head (and, at the default
  `scaling_pass_value` of 0, without any LoRA arithmetic); the gate turns its last hidden state into scalings λ. The
  **adapted pass** is the call itself, whose LoRA layers mix the experts by λ.
- `scaling_pass_layers=k`: the same, but the scaling pass ends after k decoder layers; the gate reads what leaves them.
- `gate_layer=k`: no scaling pass. The gate reads what enters decoder layer k within the call itself, and the layers
  from there on follow it; in those before, every expert has the constant weight `scaling_pass_value`.

In the last two the gate reads the residual stream in the middle of the model, which has outliers: it is divided by its
root mean square over the channels, in the gate's dtype.

A pair of forward hooks on the base model (and one on decoder layer k), registered once, does this; whoever calls the
base model (peft, `generate`, a Trainer) gets it. Encoder-decoders are different: see `seq2seq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.backbone import Backbone
from weft.cache import doubled, leave_scaling_behind
from weft.carrier import CheckpointedWithScalings, Routing, ScalingsCarrier
from weft.config import XLoraConfig
from weft.errors import ConfigError
from weft.gate import XLoraClassifier
from weft.routing import keep_top_k
from weft.scalings_log import ScalingsLog


class Passes:
    """Computes the scalings of each call of a base model and lets the layers follow them.

    Args:
        backbone: of the base model.
        carrier: brings the scalings to the layers.
        gate: predicts the scalings.
        config: options, read at every call.
        first_layer: number of the first LoRA layer that follows the gate; those before have constant weights.
        output_layer: number of the LoRA layer that is the LM head, if it is adapted.

    Attributes:
        disabled: leave the experts out altogether.
        log: a record of the scalings.
    """

    def __init__(
        self,
        backbone: Backbone,
        carrier: ScalingsCarrier,
        gate: XLoraClassifier,
        config: XLoraConfig,
        *,
        first_layer: int,
        output_layer: int | None,
    ) -> None:
        self.backbone = backbone
        self.carrier = carrier
        self.gate = gate
        self.config = config
        self.first_layer = first_layer
        self.output_layer = output_layer
        self.disabled = False
        self.log = ScalingsLog(config.scalings_log_size)
        self._latest: Tensor | None = None
        self._fixed: Tensor | None = None
        # Arguments of a call in progress whose gate has not read yet.
        self._awaiting_gate: dict[str, Any] | None = None

    def attach(self, base: nn.Module) -> None:
        """Register the hooks, once."""
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, always_call=True)
        if self.config.gate_layer is not None:
            layer = self.backbone.decoder_layers()[self.config.gate_layer]
            layer.register_forward_pre_hook(self._at_gate_layer, with_kwargs=True)

    @staticmethod
    def detach(base: nn.Module) -> None:
        """Remove the hooks, and what gradient checkpointing was given, from a base model."""
        module: Any
        for module in base.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(getattr(hook, "__self__", None), Passes):
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
                        module._forward_hooks_always_called.pop(key, None)
            function = getattr(module, "_gradient_checkpointing_func", None)
            if isinstance(function, CheckpointedWithScalings):
                module._gradient_checkpointing_func = function.checkpoint

    @contextmanager
    def fixed_scalings(self, weights: Float[Tensor, "layer expert"]) -> Iterator[None]:
        """Use these weights for every token (a layer axis of 1: for every layer), without a gate."""
        # To the gate's device here, not in every layer at every call.
        before, self._fixed = self._fixed, weights[None, None].to(self._device)
        try:
            yield
        finally:
            self._fixed = before

    @property
    def latest_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """Of the last call, as the gate gave them; before `first_layer` the constant weights."""
        return None if self._latest is None else self._whole(self._latest)

    @property
    def applied_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """What the layers followed in the last call: the latest scalings, of which top-k keeps some."""
        return None if self._latest is None else self._whole(self._top_k(self._latest))

    @property
    def gate_decides(self) -> bool:
        """Whether the next call asks the gate: the experts are on, and their weights not fixed."""
        return not self.disabled and self._fixed is None

    def _top_k(self, scalings: Tensor) -> Tensor:
        return keep_top_k(scalings, self.config.top_k_lora, renormalise=self.config.enable_softmax_topk)

    def _whole(self, scalings: Tensor) -> Float[Tensor, "batch seq layer expert"]:
        if self.first_layer == 0:
            return scalings
        batch, seq, _, num_experts = scalings.shape
        constant = scalings.new_full((batch, seq, self.first_layer, num_experts), self.config.constant_weight)
        return torch.cat([constant, scalings], dim=2)

    @property
    def _device(self) -> torch.device:
        return next(self.gate.parameters()).device

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._awaiting_gate = None
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
        elif self.config.gate_layer is not None:
            leave_scaling_behind(cache)
            self.carrier.routing = self._constant()
            self._awaiting_gate = arguments
        else:
            self._ask_gate(arguments, cache)
        return (), arguments

    def _ask_gate(self, arguments: dict[str, Any], cache: Any) -> None:
        """Let the layers of a call of the base model follow the gate."""
        if cache is not None:
            cache = doubled(cache, self.config.scaling_pass_layers).scaling
        self._follow_gate(self._scaling_pass(arguments, cache), arguments)

    def _after(self, base: nn.Module, args: Any, output: Any) -> None:
        if not self.carrier.in_scaling_pass:
            self.carrier.clear()
            self._awaiting_gate = None

    def _at_gate_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments, self._awaiting_gate = self._awaiting_gate, None
        if arguments is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._follow_gate(self._normalised(hidden.detach()), arguments)

    def _scaling_pass(self, arguments: dict[str, Any], cache: Any) -> Float[Tensor, "batch seq hidden"]:
        """What the gate reads, for the arguments of a call of the base model.

        The pass runs in the mode (training or evaluation) that the model is in, and without gradients: the gate is
        what learns.
        """
        routing = None if self.config.constant_weight == 0 else self._constant()
        layers = self.config.scaling_pass_layers
        with torch.no_grad(), self.carrier.scaling_pass(routing):
            if layers is None:
                return self.backbone.last_hidden_state(arguments, cache)
            return self._normalised(self.backbone.residual_stream(arguments, cache, layers))

    def _normalised(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(next(self.gate.parameters()).dtype)
        return F.rms_norm(hidden, hidden.shape[-1:])

    def _constant(self) -> Routing:
        # One position and one layer for all: every expert acts with the same weight everywhere.
        shape = (1, 1, 1, self.config.num_experts)
        return Routing(torch.full(shape, self.config.constant_weight, device=self._device))

    def _follow_gate(self, hidden: Tensor, arguments: dict[str, Any]) -> None:
        """Let the layers follow the gate's answer to `hidden` from here on."""
        scalings = self._latest = self.gate(hidden.to(self._device))
        if self.log.enabled:
            self.log.record(self._whole(scalings))
        if not self.config.layerwise_scalings:
            scalings = scalings[:, :, :1]  # one computation for all layers
        padding = arguments.get("attention_mask")
        keep = arguments.get("logits_to_keep")
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else None
        self.carrier.routing = Routing(
            self._top_k(scalings),
            first_layer=self.first_layer,
            padding=padding if isinstance(padding, Tensor) and padding.dim() == 2 else None,
            output_layer=self.output_layer,
            output_positions=keep,
        )

    def _carry_scalings_through_checkpoints(self, base: nn.Module) -> None:
        # At every call, because gradient checkpointing may be switched on, with plain functions, at any time.
        module: Any
        for module in base.modules():
            function = getattr(module, "_gradient_checkpointing_func", None)
            if function is not None and not isinstance(function, CheckpointedWithScalings):
                module._gradient_checkpointing_func = CheckpointedWithScalings(function, self.carrier)

    def __getstate__(self) -> dict[str, Any]:
        # The latest scalings are part of a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "_latest": None, "_awaiting_gate": None}


def first_following_layer(backbone: Backbone, config: XLoraConfig) -> int:
    """Number of the first LoRA layer that follows the gate; 0 but with `gate_layer`.

    Raises:
        ConfigError: `gate_layer` or `scaling_pass_layers` is no place in this base model, or no LoRA layer follows.
    """
    if not config.reads_inside:
        return 0
    if backbone.is_encoder_decoder:
        name = "gate_layer" if config.scaling_pass_layers is None else "scaling_pass_layers"
        raise ConfigError(
            f"{name} ({getattr(config, name)}) must be None for an encoder-decoder ({type(backbone.base).__name__}): "
            "leave it out"
        )
    decoder_layers = backbone.decoder_layers()
    number = len(decoder_layers)
    if config.scaling_pass_layers is not None:
        if config.scaling_pass_layers > number:
            raise ConfigError(
                f"scaling_pass_layers ({config.scaling_pass_layers}) must be between 1 and the number of decoder "
                f"layers ({number})"
            )
        return 0
    assert config.gate_layer is not None
    if config.gate_layer >= number:
        raise ConfigError(f"gate_layer ({config.gate_layer}) must be below the number of decoder layers ({number})")
    before = 0
    modules = iter(backbone.base.modules())
    while (module := next(modules)) is not decoder_layers[config.gate_layer]:
        before += isinstance(module, LoraLayer)
    if not any(isinstance(module, LoraLayer) for module in modules):
        raise ConfigError(
            f"gate_layer ({config.gate_layer}) leaves no LoRA layer that could follow the gate: choose a lower one"
        )
    return before

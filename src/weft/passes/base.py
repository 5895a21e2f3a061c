"""The passes of each call of a base model: how the gate's input is computed, and which scalings the layers use.

The config selects one of three schemes:

- The default, as in the paper (arXiv 2402.07148): a **scaling pass** runs the backbone without the head, and without
  LoRA at the default `scaling_pass_value` of 0. The gate computes the scalings λ from its last hidden state. In the
  **adapted pass**, the call itself, the LoRA layers mix the experts by λ.
- `scaling_pass_layers=k`: the scaling pass ends after k decoder layers, and the gate reads their output.
- `gate_layer=k`: there is no scaling pass. The gate reads the input of decoder layer k during the call, and the layers
  from there on use its scalings. In the layers before, each expert has the constant weight `scaling_pass_value`.

In the last two schemes the gate reads the residual stream inside the model, which has outliers. So it is divided by its
root mean square over the channels, in the gate's dtype.

This is done by forward hooks on the base model and on decoder layer k, so that it works for every caller (peft,
`generate`, a Trainer). For encoder-decoders see `seq2seq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from weft.base_model.backbone import Backbone
from weft.base_model.devices import resident_device
from weft.config import XLoraConfig
from weft.errors import ConfigError
from weft.gate.classifier import XLoraClassifier
from weft.gate.routing import Sees
from weft.layers.carrier import Routing, ScalingsCarrier
from weft.layers.decode_weights import DecodeWeights
from weft.passes.cache import XLoraCache, doubled, leave_scaling_behind
from weft.passes.frozen import SequenceMeans, frozen_scalings_problems
from weft.passes.gate_losses import GateLosses
from weft.passes.log import ScalingsLog
from weft.passes.one_thread import OneThread
from weft.passes.padding import padding_of
from weft.passes.precomputed import take_precomputed
from weft.passes.recompute import Readers, carry_through_checkpoints, undo_checkpoints
from weft.passes.routings import Routings
from weft.passes.rows import RowScalings
from weft.passes.scaling_lora import linear_layers


class Passes:
    """Computes the scalings of each call of a base model and passes them to the layers.

    Args:
        backbone: the backbone of the base model.
        carrier: passes the scalings to the layers.
        gate: computes the scalings.
        config: options, read in each call.
        first_layer: number of the first LoRA layer that uses the gate's scalings; those before have constant weights.
        kinds: kind of input of each LoRA layer.
        decode_weights: computes the rank weights for short inputs.

    Attributes:
        routings: makes the `Routing` of each pass.
        disabled: whether the experts are left out of all calls.
        log: the log of scalings.
        thread: the thread that uses the model.
        losses: the gate's losses and metrics in training.
    """

    def __init__(
        self,
        backbone: Backbone,
        carrier: ScalingsCarrier,
        gate: XLoraClassifier,
        config: XLoraConfig,
        *,
        first_layer: int,
        kinds: tuple[Sees, ...],
        decode_weights: DecodeWeights,
    ) -> None:
        self.backbone = backbone
        self.carrier = carrier
        self.gate = gate
        self.config = config
        self.routings = Routings(config, first_layer=first_layer, kinds=kinds, decode_weights=decode_weights)
        self.disabled = False
        self.log = ScalingsLog(config.scalings_log_size)
        self.losses = GateLosses(
            config, shifts_labels=backbone.shifts_labels, labels_are_targets=backbone.is_encoder_decoder
        )
        self.thread = OneThread()
        self._latest: Tensor | None = None
        self._followed: Routing | None = None
        self._rows: RowScalings | None = None
        self._freeze_at: int | None = None
        self._ahead: Tensor | None = None
        # Arguments of the present call, until the gate has run (with gate_layer).
        self._awaiting_gate: dict[str, Any] | None = None
        self._gate_readers: Readers = {}

    def attach(self, base: nn.Module) -> None:
        """Register the hooks, once."""
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, always_call=True)
        if self.config.scaling_pass_rank is not None:
            assert self.config.scaling_pass_layers is not None
            for name, module in linear_layers(self.backbone, self.config.scaling_pass_layers).items():
                module.register_forward_hook(partial(self._add_scaling_lora, name))
        if self.config.gate_layer is not None:
            layer = self.backbone.decoder_layers()[self.config.gate_layer]
            layer.register_forward_pre_hook(self._at_gate_layer, with_kwargs=True)
            self._gate_readers = {layer: self._at_gate_layer}

    @staticmethod
    def detach(base: nn.Module) -> None:
        """Remove the hooks and the wrappers of gradient checkpointing from a base model."""
        undo_checkpoints(base)
        for module in base.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    method = getattr(hook, "func", hook)  # a partial's
                    if isinstance(getattr(method, "__self__", None), Passes):
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
                        module._forward_hooks_always_called.pop(key, None)

    def fixed_scalings(self, weights: Float[Tensor, "layer expert"]) -> AbstractContextManager[None]:
        """In this block, use these weights for all tokens, without the gate. A layer axis of 1: for all layers."""
        # Moved to the gate's device once, not in each layer and call.
        return self._in_this_block(self.routings, "fixed", weights[None, None].to(self._device))

    def scalings_of_rows(self, rows: RowScalings) -> AbstractContextManager[None]:
        """In this block, each row of the batch uses the gate or its own weights; repeated rows (beams) do the same."""
        return self._in_this_block(self, "_rows", rows)

    @contextmanager
    def _in_this_block(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        with self.thread.held():
            before = getattr(owner, name)
            setattr(owner, name, value)
            try:
                yield
            finally:
                setattr(owner, name, before)

    def check_rows(self, arguments: dict[str, Any]) -> None:
        """Raise if the batch of a call does not have one row for each name in `adapter_names`.

        Raises:
            ConfigError: the numbers differ.
        """
        batch = self.backbone.batch_size(arguments)
        if self._rows is not None and batch not in (0, len(self._rows.gated)):
            raise ConfigError(
                f"adapter_names has {len(self._rows.gated)} names, expected {batch}: one for each row of the batch"
            )

    def followed(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """The scalings that the layers used in the last call, after top-k; None without a call or with the experts off.

        An axis has size 1 if it has one value for all: all axes except the last for fixed scalings, `seq` for frozen
        scalings, `layer` without `layerwise_scalings`.
        """
        if self.disabled or self._followed is None:
            return None
        scalings = self._followed.scalings
        if self._followed.first_layer == 0:
            return scalings
        return self.routings.with_constant_layers(scalings.expand(-1, -1, self.gate.num_layers, -1))

    @property
    def latest_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """The gate's output in the last call, before top-k; the constant weights in layers before `first_layer`."""
        return None if self._latest is None else self.routings.with_constant_layers(self._latest)

    @property
    def gate_decides(self) -> bool:
        """Whether the next call runs the gate: the experts are on and their weights are not fixed."""
        rows = self._rows
        return not self.disabled and self.routings.fixed is None and (rows is None or not rows.none_gated)

    @property
    def _device(self) -> torch.device:
        return resident_device(self.gate)

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.thread.claim()
        self._awaiting_gate = None
        if self.carrier.in_scaling_pass:
            return None
        arguments = self.backbone.named_arguments(args, kwargs)
        self.losses.begin(arguments, training=base.training and torch.is_grad_enabled() and self.gate_decides)
        precomputed = take_precomputed(arguments, self.config, self.backbone)
        if self.disabled:
            leave_scaling_behind(self.backbone.cache_of(arguments))
            return (), arguments
        if getattr(base, "_is_replica", False):
            raise RuntimeError(
                "X-LoRA cannot run in torch.nn.DataParallel, whose threads would share one model's scalings: start one "
                "process per device (torchrun, accelerate launch), or show it a single one (CUDA_VISIBLE_DEVICES)"
            )
        self.carrier.clear()
        if torch.is_grad_enabled():
            carry_through_checkpoints(base, self.carrier, self._gate_readers)
        self._begin_rows(arguments)
        fixed, frozen = self.routings.without_gate(), self._frozen_means(arguments)
        two_passes = precomputed is None and frozen is None and fixed is None and self.config.gate_layer is None
        self.backbone.settle_cache(arguments, two_passes=two_passes)
        cache = self.backbone.cache_of(arguments)
        self.routings.decode_weights.begin_call(cache)
        if fixed is not None:
            leave_scaling_behind(cache)
            self._follow(self.routings.of_rows(fixed))
        elif self.config.gate_layer is not None:
            leave_scaling_behind(cache)
            self.carrier.routing = self.routings.constant(self._device)
            self._awaiting_gate = arguments
        elif precomputed is not None:
            leave_scaling_behind(cache)
            self._follow_gate(precomputed, arguments)
        elif frozen is not None:
            leave_scaling_behind(cache)
            self._follow(self.routings.of_rows(self.routings.mixed(frozen.mean())))
        else:
            self._ask_gate(arguments, cache)
        return (), arguments

    def _begin_rows(self, arguments: dict[str, Any]) -> None:
        rows = self._rows
        self.routings.rows = None if rows is None else rows.of_batch(self.backbone.batch_size(arguments))

    def _frozen_means(self, arguments: dict[str, Any]) -> SequenceMeans | None:
        """The mean scalings in the call's cache if they are frozen, else None."""
        cache = self.backbone.cache_of(arguments)
        means = cache.means if isinstance(cache, XLoraCache) else None
        return means if means is not None and means.frozen else None

    def _ask_gate(self, arguments: dict[str, Any], cache: Any) -> None:
        """Run the scaling pass and the gate, and let the layers of the call use its scalings."""
        cache = None if cache is None else doubled(cache, self.config.scaling_pass_layers)
        hidden = self._ahead
        if hidden is None:
            hidden = self._scaling_pass(arguments, None if cache is None else cache.scaling)
        scalings = self._follow_gate(hidden, arguments)
        if cache is not None and self._freeze_at is not None:
            cache.count_in(scalings.detach(), arguments.get("attention_mask"), self._freeze_at)

    @torch.no_grad()
    def scaling_step(self, input_ids: Int[Tensor, "batch seq"], cache: XLoraCache) -> Float[Tensor, "batch seq hidden"]:
        """Run only the scaling pass, before the call with the same tokens (see `after_scaling_steps`)."""
        return self._scaling_pass({"input_ids": input_ids}, cache.scaling)

    @torch.no_grad()
    def scaling_pass_alone(self, arguments: dict[str, Any]) -> Float[Tensor, "batch seq hidden"]:
        """Run only the scaling pass, without a cache; returns the gate's input for a call with these arguments."""
        return self._scaling_pass(arguments, None)

    def scaling_pass_to_train(self, arguments: dict[str, Any]) -> Float[Tensor, "batch seq hidden"]:
        """`scaling_pass_alone` with gradients, for the gate's own LoRA in it."""
        return self._run_scaling_pass(arguments, None)

    def _add_scaling_lora(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A forward hook of a linear layer: in the scaling pass, add the gate's own LoRA to its output."""
        if not self.carrier.in_scaling_pass:
            return None
        part = self.gate.scaling_pass_lora.get_submodule(name)
        return output + part(args[0]).to(output.device, output.dtype)

    def after_scaling_steps(self, hidden: Float[Tensor, "batch seq hidden"]) -> AbstractContextManager[None]:
        """In this block, calls use `hidden` as the result of their scaling pass."""
        return self._in_this_block(self, "_ahead", hidden)

    @contextmanager
    def as_scaling_pass(self) -> Iterator[None]:
        """In this block, the layers work as in the scaling pass: each expert has the weight `scaling_pass_value`."""
        with self.thread.held():
            routing = None if self.config.constant_weight == 0 else self.routings.constant(self._device)
            with self.carrier.scaling_pass(routing):
                yield

    def check_frozen_scalings(self, after: int, generation: dict[str, Any]) -> None:
        """Raise if the scalings cannot be frozen after this number of new tokens, with these options of `generate`.

        Raises:
            ConfigError: all problems at once.
        """
        problems = frozen_scalings_problems(after, generation, gate_layer=self.config.gate_layer)
        if self.backbone.is_encoder_decoder:
            problems.append(
                f"freeze_scalings_after ({after!r}) is not supported with an encoder-decoder "
                f"({type(self.backbone.base).__name__}): leave it out"
            )
        if problems:
            raise ConfigError("the scalings cannot be frozen:", problems)

    def freeze_scalings_at(self, length: int) -> AbstractContextManager[None]:
        """In this block, freeze each sequence's scalings at their mean once its cache has this number of tokens."""
        return self._in_this_block(self, "_freeze_at", length)

    def _after(self, base: nn.Module, args: Any, output: Any) -> Any:
        if self.thread.is_elsewhere or self.carrier.in_scaling_pass:
            return None
        self.carrier.clear()
        self._awaiting_gate = self.routings.rows = None
        output = self.losses.finish(output)
        self.thread.release()
        return output

    def _at_gate_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments, self._awaiting_gate = self._awaiting_gate, None
        if arguments is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._follow_gate(self._normalised(hidden.detach()), arguments)

    def _scaling_pass(self, arguments: dict[str, Any], cache: Any) -> Float[Tensor, "batch seq hidden"]:
        """Run the scaling pass for the arguments of a call, and return the gate's input.

        The pass runs in the model's present mode (training or evaluation) and without gradients, as only the gate is
        trained through it.
        """
        with torch.no_grad():
            return self._run_scaling_pass(arguments, cache)

    def _run_scaling_pass(self, arguments: dict[str, Any], cache: Any) -> Float[Tensor, "batch seq hidden"]:
        layers = self.config.scaling_pass_layers
        with self.as_scaling_pass():
            if layers is None:
                return self.backbone.last_hidden_state(arguments, cache)
            return self._normalised(self.backbone.residual_stream(arguments, cache, layers))

    def _normalised(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(next(self.gate.parameters()).dtype)
        return F.rms_norm(hidden, hidden.shape[-1:])

    def _follow_gate(self, hidden: Tensor, arguments: dict[str, Any]) -> Float[Tensor, "batch seq layer expert"]:
        """Run the gate on `hidden` and let the layers use its scalings from here on; returns them after top-k."""
        scalings = self._latest = self.gate(hidden.to(self._device))
        if self.log.enabled:
            self.log.record(self.routings.with_constant_layers(scalings))
        if not self.config.layerwise_scalings:
            scalings = scalings[:, :, :1]  # the same for all layers
        padding = padding_of(self.backbone.base, arguments, scalings.shape[1], scalings.device)
        kept, chosen = self.routings.top_k(scalings)
        self.losses.gate_answered(scalings, kept, chosen, padding)
        keep = arguments.get("logits_to_keep")
        if isinstance(keep, int):
            keep = slice(-keep, None) if keep else None
        elif isinstance(keep, Tensor):
            keep = keep.to(scalings.device)
        self._follow(self.routings.of_gate(kept, chosen, padding=padding, kept=keep))
        return kept

    def _follow(self, routing: Routing) -> None:
        self.carrier.routing = self._followed = routing

    def __getstate__(self) -> dict[str, Any]:
        # The latest scalings belong to an autograd graph, which cannot be copied or pickled.
        return {**self.__dict__, "_latest": None, "_followed": None, "_awaiting_gate": None}

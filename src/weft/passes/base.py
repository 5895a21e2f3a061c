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
from contextlib import AbstractContextManager, contextmanager
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


class Passes:
    """Computes the scalings of each call of a base model and lets the layers follow them.

    Args:
        backbone: of the base model.
        carrier: brings the scalings to the layers.
        gate: predicts the scalings.
        config: options, read at every call.
        first_layer: number of the first LoRA layer that follows the gate; those before have constant weights.
        kinds: what each LoRA layer sees.
        decode_weights: prepares what the layers need, where tokens are few.

    Attributes:
        routings: makes what the layers follow.
        disabled: leave the experts out altogether.
        log: a record of the scalings.
        thread: which one uses the model.
        losses: the gate's own losses and metrics in training.
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
        # Arguments of a call in progress whose gate has not read yet.
        self._awaiting_gate: dict[str, Any] | None = None
        self._gate_readers: Readers = {}

    def attach(self, base: nn.Module) -> None:
        """Register the hooks, once."""
        base.register_forward_pre_hook(self._before, with_kwargs=True)
        base.register_forward_hook(self._after, always_call=True)
        if self.config.gate_layer is not None:
            layer = self.backbone.decoder_layers()[self.config.gate_layer]
            layer.register_forward_pre_hook(self._at_gate_layer, with_kwargs=True)
            self._gate_readers = {layer: self._at_gate_layer}

    @staticmethod
    def detach(base: nn.Module) -> None:
        """Remove the hooks, and what gradient checkpointing was given, from a base model."""
        undo_checkpoints(base)
        for module in base.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if isinstance(getattr(hook, "__self__", None), Passes):
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
                        module._forward_hooks_always_called.pop(key, None)

    def fixed_scalings(self, weights: Float[Tensor, "layer expert"]) -> AbstractContextManager[None]:
        """Use these weights for every token (a layer axis of 1: for every layer), without a gate."""
        # To the gate's device here, not in every layer at every call.
        return self._in_this_block(self.routings, "fixed", weights[None, None].to(self._device))

    def scalings_of_rows(self, rows: RowScalings) -> AbstractContextManager[None]:
        """Let each row of the batch follow what is its own; rows that are repeated, as for beams, do alike."""
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
        """Raise where a call of the model does not have as many rows as were named.

        Raises:
            ConfigError: it has more or fewer.
        """
        batch = self.backbone.batch_size(arguments)
        if self._rows is not None and batch not in (0, len(self._rows.gated)):
            raise ConfigError(
                f"adapter_names has {len(self._rows.gated)} names, expected {batch}: one for each row of the batch"
            )

    def followed(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """What the layers followed in the last call, top-k applied; None before the first and with the experts off.

        Axes are 1 where one value holds for all: every axis but the last at fixed scalings, `seq` at frozen ones,
        `layer` with a gate that does not tell layers apart.
        """
        if self.disabled or self._followed is None:
            return None
        scalings = self._followed.scalings
        if self._followed.first_layer == 0:
            return scalings
        return self.routings.with_constant_layers(scalings.expand(-1, -1, self.gate.num_layers, -1))

    @property
    def latest_scalings(self) -> Float[Tensor, "batch seq layer expert"] | None:
        """Of the last call, as the gate gave them; before `first_layer` the constant weights."""
        return None if self._latest is None else self.routings.with_constant_layers(self._latest)

    @property
    def gate_decides(self) -> bool:
        """Whether the next call asks the gate: the experts are on, and their weights not fixed."""
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
        """The scalings that the layers go on with, where those of the call's cache are frozen."""
        cache = self.backbone.cache_of(arguments)
        means = cache.means if isinstance(cache, XLoraCache) else None
        return means if means is not None and means.frozen else None

    def _ask_gate(self, arguments: dict[str, Any], cache: Any) -> None:
        """Let the layers of a call of the base model follow the gate."""
        cache = None if cache is None else doubled(cache, self.config.scaling_pass_layers)
        hidden = self._ahead
        if hidden is None:
            hidden = self._scaling_pass(arguments, None if cache is None else cache.scaling)
        scalings = self._follow_gate(hidden, arguments)
        if cache is not None and self._freeze_at is not None:
            cache.count_in(scalings.detach(), arguments.get("attention_mask"), self._freeze_at)

    @torch.no_grad()
    def scaling_step(self, input_ids: Int[Tensor, "batch seq"], cache: XLoraCache) -> Float[Tensor, "batch seq hidden"]:
        """The scaling pass alone, ahead of the call that will read these tokens (see `after_scaling_steps`)."""
        return self._scaling_pass({"input_ids": input_ids}, cache.scaling)

    @torch.no_grad()
    def scaling_pass_alone(self, arguments: dict[str, Any]) -> Float[Tensor, "batch seq hidden"]:
        """What the gate would read in a call of the base model with these arguments, without a cache."""
        return self._scaling_pass(arguments, None)

    def after_scaling_steps(self, hidden: Float[Tensor, "batch seq hidden"]) -> AbstractContextManager[None]:
        """In this block a call has its scaling pass behind it, which gave `hidden` for its tokens."""
        return self._in_this_block(self, "_ahead", hidden)

    @contextmanager
    def as_scaling_pass(self) -> Iterator[None]:
        """In this block the layers do what they do in the scaling pass: every expert has one constant weight, or 0."""
        with self.thread.held():
            routing = None if self.config.constant_weight == 0 else self.routings.constant(self._device)
            with self.carrier.scaling_pass(routing):
                yield

    def check_frozen_scalings(self, after: int, generation: dict[str, Any]) -> None:
        """Raise where the scalings cannot be frozen after so many new tokens, in a generation with these options.

        Raises:
            ConfigError: all that is wrong.
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
        """Freeze each sequence's scalings, at their mean so far, once its cache has this many tokens."""
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
        """What the gate reads, for the arguments of a call of the base model.

        The pass runs in the mode (training or evaluation) that the model is in, and without gradients: the gate is
        what learns.
        """
        layers = self.config.scaling_pass_layers
        with torch.no_grad(), self.as_scaling_pass():
            if layers is None:
                return self.backbone.last_hidden_state(arguments, cache)
            return self._normalised(self.backbone.residual_stream(arguments, cache, layers))

    def _normalised(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(next(self.gate.parameters()).dtype)
        return F.rms_norm(hidden, hidden.shape[-1:])

    def _follow_gate(self, hidden: Tensor, arguments: dict[str, Any]) -> Float[Tensor, "batch seq layer expert"]:
        """Let the layers follow the gate's answer to `hidden` from here on; gives it, top-k applied."""
        scalings = self._latest = self.gate(hidden.to(self._device))
        if self.log.enabled:
            self.log.record(self.routings.with_constant_layers(scalings))
        if not self.config.layerwise_scalings:
            scalings = scalings[:, :, :1]  # one computation for all layers
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
        # The latest scalings are part of a graph, which can neither be copied nor pickled.
        return {**self.__dict__, "_latest": None, "_followed": None, "_awaiting_gate": None}

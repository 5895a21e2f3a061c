"""The passes of an encoder-decoder.

There is one gate. It reads

- for source tokens the encoder's last hidden state in a scaling pass of the encoder;
- for target tokens the decoder's last hidden state in a scaling pass of the decoder, whose cross-attention reads the
  encoder output of the scaling pass.

A layer uses the scalings of the tokens in its input: the encoder's layers those of the source tokens, the decoder's
layers and an LM head those of the target tokens. The keys and values of cross-attention are computed from source tokens
and use their scalings; otherwise the cached ones would depend on later target tokens. Each of these layers has its own
index in the layer axis. If encoder and decoder share a module, it uses the scalings of the part that runs.

`generate` and users can call the encoder separately, so there are hooks on the encoder and on the decoder. The decoder
of the scaling pass needs the encoder output of the scaling pass. It is stored in the encoder's output as the entry
`scaling_pass_hidden_state`, so that `generate` repeats it for beams as it repeats the other entries.
"""

from __future__ import annotations

import dataclasses
import inspect
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import EncoderDecoderCache
from transformers.utils import ModelOutput

from weft.base_model.backbone import without_head
from weft.errors import CacheError
from weft.gate.routing import Sees
from weft.layers.carrier import Routing
from weft.passes.base import Passes
from weft.passes.cache import ENCODER_DECODER_CACHE, XLoraCache, doubled
from weft.passes.padding import padding_of
from weft.passes.recompute import carry_through_checkpoints

# The entry of the encoder's output for the gate's input for source tokens.
SOURCE_ENTRY = "scaling_pass_hidden_state"
# Options of the call that are not passed to the scaling pass.
_OUTPUT_OPTIONS = {"output_hidden_states", "output_attentions"}


@dataclasses.dataclass(frozen=True)
class Seq2SeqRouting(Routing):
    """The scalings of a decoder's pass: first those of the source tokens, then those of the target tokens.

    They are one tensor, because gradient checkpointing passes a single tensor of scalings.

    Attributes:
        source_length: number of source tokens.
    """

    source_length: int = 0

    @cached_property
    def _parts(self) -> tuple[Routing, Routing]:
        target_length = self.scalings.shape[1] - self.source_length
        source, target = self.scalings.split([self.source_length, target_length], dim=1)
        return Routing(source), Routing(target, kinds=self.kinds, kept=self.kept)

    def of_layer(self, layer_number: int) -> Float[Tensor, "batch seq expert"]:
        """λ for one LoRA layer, of the tokens in its input."""
        source, target = self._parts
        return (source if self.sees(layer_number) is Sees.SOURCE else target).of_layer(layer_number)


@dataclasses.dataclass
class _Call:
    """The present call of the base model.

    Attributes:
        arguments: the arguments of the call.
        hidden: the gate's input for source tokens; None until the encoder has run.
        scalings: the gate's scalings of the source tokens; None until the gate has run.
    """

    arguments: dict[str, Any]
    hidden: Tensor | None
    scalings: Tensor | None = None


@dataclasses.dataclass
class _Encoding:
    """The present call of the encoder: the carrier's routing before it, and the gate's input."""

    routing_before: Routing | None
    hidden: Tensor | None


class Seq2SeqPasses(Passes):
    """Computes the scalings of each call of an encoder-decoder.

    The arguments are those of `Passes`. `latest_scalings` and the log have the scalings of the target tokens.

    Attributes:
        latest_source_scalings: the gate's last output for source tokens; None before the first call.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.latest_source_scalings: Tensor | None = None
        self._call: _Call | None = None
        self._encoding: _Encoding | None = None

    def attach(self, base: nn.Module) -> None:
        """Register the hooks, once."""
        model: Any = base
        super().attach(base)
        encoder, decoder = model.get_encoder(), without_head(model.get_decoder())
        encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        encoder.register_forward_hook(self._after_encoder, always_call=True)
        decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)

    def _before(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._call = None
        return super()._before(base, args, kwargs)

    def _after(self, base: nn.Module, args: Any, output: Any) -> Any:
        if not self.thread.is_elsewhere:
            self._call = None
        return super()._after(base, args, output)

    def _ask_gate(self, arguments: dict[str, Any], cache: Any) -> None:
        """Record the call; the hooks of the encoder and the decoder run the gate."""
        encoded = arguments.get("encoder_outputs")
        hidden = getattr(encoded, SOURCE_ENTRY, None)
        if encoded is not None and hidden is None:
            raise ValueError(
                f"encoder_outputs ({type(encoded).__name__}) must have {SOURCE_ENTRY}, which the gate reads: pass what "
                "this model's get_encoder() returned, as it is, outside of disable_adapter() and fixed_scalings(), or "
                "leave encoder_outputs out"
            )
        if cache is not None:
            if not isinstance(cache, EncoderDecoderCache):
                raise CacheError(
                    f"past_key_values ({type(cache).__name__}) must be an EncoderDecoderCache, as the base model is an "
                    f"encoder-decoder: pass an empty one ({ENCODER_DECODER_CACHE})"
                )
            doubled(cache)
        self._call = _Call(arguments, hidden)

    def _before_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.thread.claim()  # generate calls the encoder by itself
        if self.carrier.in_scaling_pass or self.disabled:
            return
        before, arguments = self.carrier.routing, _by_name(encoder, args, kwargs)
        self._begin_rows(arguments)
        fixed = self.routings.without_gate()
        if fixed is not None:
            self._encoding = _Encoding(before, None)
            self.carrier.routing = self.routings.of_rows(fixed)
            return
        if torch.is_grad_enabled():
            carry_through_checkpoints(encoder, self.carrier)
        hidden = self._read(encoder, arguments)
        padding = padding_of(encoder, arguments, hidden.shape[1], self._device)
        scalings = self._source_scalings(hidden, padding)
        if self._call is not None:
            self._call.hidden, self._call.scalings = hidden, scalings
        self._encoding = _Encoding(before, hidden)
        kinds, of_biases = self.routings.kinds, self.routings.of_biases()
        self.carrier.routing = Routing(scalings, padding=padding, kinds=kinds, of_biases=of_biases)

    def _after_encoder(self, encoder: nn.Module, args: Any, output: Any) -> None:
        if self.thread.is_elsewhere or self.carrier.in_scaling_pass:
            return
        encoding, self._encoding = self._encoding, None
        if encoding is not None:
            self.carrier.routing = encoding.routing_before
            if encoding.hidden is not None and isinstance(output, ModelOutput):
                output[SOURCE_ENTRY] = encoding.hidden
        if self._call is None:
            self.thread.release()

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.carrier.in_scaling_pass or not self.gate_decides:
            return
        call = self._call
        if call is None or call.hidden is None:
            raise RuntimeError(
                f"the decoder ({type(decoder).__name__}) was called by itself, where the gate knows no source tokens: "
                "call the whole model, with encoder_outputs if the encoder has run already"
            )
        arguments = _by_name(decoder, args, kwargs)
        cache_name = str(self.backbone.cache_name)
        cache = arguments.get(cache_name)
        hidden = self._read(
            decoder,
            {
                **arguments,
                "encoder_hidden_states": call.hidden,
                cache_name: cache.scaling if isinstance(cache, XLoraCache) else None,
                "use_cache": cache is not None,
            },
        )
        self._follow_gate(hidden, {**arguments, "logits_to_keep": call.arguments.get("logits_to_keep")})
        # If the keys and values of cross-attention are cached, no layer has source tokens as its input.
        if cache is None or not any(cache.is_updated.values()):
            if call.scalings is None:
                padding = padding_of(self.backbone.base, call.arguments, call.hidden.shape[1], self._device)
                call.scalings = self._source_scalings(call.hidden, padding)
            self._follow_source_too(call.scalings)

    def _follow_source_too(self, source: Tensor) -> None:
        target = self.carrier.routing
        assert target is not None
        self.carrier.routing = Seq2SeqRouting(
            torch.cat([source, target.scalings], dim=1),
            padding=target.padding,
            kinds=target.kinds,
            kept=target.kept,
            of_biases=target.of_biases,
            source_length=source.shape[1],
        )

    def _source_scalings(self, hidden: Tensor, padding: Tensor | None) -> Float[Tensor, "batch seq layer expert"]:
        """Run the gate for source tokens; returns the scalings that the layers use."""
        scalings = self.latest_source_scalings = self.gate(hidden.to(self._device))
        scalings = scalings if self.config.layerwise_scalings else scalings[:, :, :1]
        kept, chosen = self.routings.top_k(scalings)
        self.losses.gate_answered(scalings, kept, chosen, padding)
        return self.routings.mixed(kept)

    def _read(self, module: nn.Module, arguments: dict[str, Any]) -> Float[Tensor, "batch seq hidden"]:
        """Run a scaling pass of the encoder or the decoder; returns its last hidden state."""
        arguments = {name: value for name, value in arguments.items() if name not in _OUTPUT_OPTIONS}
        with torch.no_grad(), self.as_scaling_pass():
            hidden = getattr(module(**{**arguments, "return_dict": True}), "last_hidden_state", None)
        if hidden is None:
            raise ValueError(
                f"the base model's {type(module).__name__} gives no last_hidden_state that a gate could read: expected "
                "an encoder-decoder like T5 or BART"
            )
        return hidden

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "latest_source_scalings": None, "_call": None, "_encoding": None}


def _by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inspect.signature(module.forward).parameters, args, strict=False)), **kwargs}

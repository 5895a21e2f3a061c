"""Scaling pass and adapted pass in one call of the model, so that vLLM schedules, caches and compiles them together.

The scaling pass is a second backbone that shares all modules with the first one, except the attention modules. These
register themselves with vLLM and get their own KV cache blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.sequence import IntermediateTensors

from weft.errors import ConfigError
from weft.serve.following import Following

SCALING_PREFIX = "weft_scaling"
# The names in vLLM's models of the backbone, its decoder layers, and the norm after them.
_BACKBONES = ("model", "transformer", "gpt_neox", "backbone")
_LAYERS = ("layers", "h", "blocks")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Decoder:
    """The decoder layers of a backbone.

    Attributes:
        owner: the module that has them.
        layers: name of the attribute with the layers.
        norm: name of the norm after them; None if there is none.
    """

    owner: Any
    layers: str
    norm: str | None


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a model of vLLM that computes the last hidden state.

    Raises:
        ConfigError: the model has no part with a known name.
    """
    for name in _BACKBONES:
        found = getattr(model, name, None)
        if isinstance(found, nn.Module):
            return found
    raise ConfigError(
        f"the engine's {type(model).__name__.removeprefix('Weft')} has no backbone by a known name "
        f"({', '.join(_BACKBONES)}), around which a mixture could be put"
    )


def decoder_of(backbone: nn.Module) -> Decoder:
    """The decoder layers of a backbone.

    Raises:
        ConfigError: the backbone has no layers with a known name.
    """
    for owner in (backbone, getattr(backbone, "decoder", None)):
        layers = next((name for name in _LAYERS if isinstance(getattr(owner, name, None), nn.ModuleList)), None)
        if layers is not None:
            norm = next((name for name in _NORMS if isinstance(getattr(owner, name, None), nn.Module)), None)
            return Decoder(owner, layers, norm)
    raise ConfigError(
        f"the engine's {type(backbone).__name__} has no decoder layers by a known name ({', '.join(_LAYERS)}), which "
        "gate_layer and scaling_pass_layers need: serve a mixture with a whole scaling pass"
    )


class Residual(nn.Module):
    """Replaces a backbone's last norm for `scaling_pass_layers`, as the gate reads the residual stream without it."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """The sum of hidden states and residual of vLLM's layers; a pair if the norm returns a pair."""
        return hidden if residual is None else (hidden + residual, None)


def scaling_backbone(vllm_config: Any, backbone: nn.Module, num_layers: int | None) -> nn.Module:
    """A backbone that shares all weights with the given one, but has its own KV cache.

    Args:
        vllm_config: the engine's config.
        backbone: the model's backbone, such as vLLM's `LlamaModel`.
        num_layers: number of layers (`scaling_pass_layers`); None for all.
    """
    known = vllm_config.compilation_config.static_forward_context
    before = set(known)
    with torch.device("meta"):  # to avoid twice the memory while the model is loaded
        twin: Any = type(backbone)(vllm_config=vllm_config, prefix=SCALING_PREFIX)
    _share(twin, backbone)
    if num_layers is not None:
        decoder = decoder_of(twin)
        setattr(decoder.owner, decoder.layers, getattr(decoder.owner, decoder.layers)[:num_layers])
        decoder.owner.end_layer = num_layers
        if decoder.norm is not None:
            setattr(decoder.owner, decoder.norm, Residual())
    kept = {id(module) for module in twin.modules()}
    for name in set(known) - before:
        if id(known[name]) not in kept:
            del known[name]
    return twin


def _share(twin: nn.Module, module: nn.Module) -> None:
    """Share all modules of the first instance with the second one, except attention modules."""
    twin._parameters, twin._buffers = module._parameters, module._buffers
    for name, child in list(twin.named_children()):
        if isinstance(child, AttentionLayerBase):
            _take_tensors(child, getattr(module, name))
        elif any(isinstance(part, AttentionLayerBase) for part in child.modules()):
            _share(child, getattr(module, name))
        else:
            twin._modules[name] = getattr(module, name)


def _take_tensors(attention: nn.Module, other: nn.Module) -> None:
    """Copy tensors, such as the scales of keys and values, to an attention module that was made on the meta device."""
    pairs: list[tuple[Any, Any]] = [
        (attention, other),
        (getattr(attention, "impl", None), getattr(other, "impl", None)),
    ]
    for own, of_other in pairs:
        values = {} if own is None else vars(own)
        for name in [name for name, value in values.items() if isinstance(value, Tensor) and value.is_meta]:
            values[name] = getattr(of_other, name)
    for part, of_other in zip(attention.modules(), other.modules(), strict=True):
        part._parameters, part._buffers = dict(of_other._parameters), dict(of_other._buffers)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class BothPasses(nn.Module):
    """Both passes as one module, which torch.compile compiles to one graph; the backbones are not compiled separately.

    Args:
        vllm_config: the engine's config.
        prefix: vLLM's prefix of names.
        backbone: the backbone of the adapted pass.
        scaling: the backbone of the scaling pass; None with `gate_layer`.
        following: the gate and the scalings.
    """

    def __init__(
        self,
        *,
        vllm_config: Any,
        prefix: str = "",
        backbone: nn.Module,
        scaling: nn.Module | None,
        following: Following,
    ) -> None:
        super().__init__()
        self.following = following
        # In a tuple, so that they are not submodules: they are submodules of the model already.
        backbones: list[Any] = [backbone, scaling]
        for each in backbones:
            if each is not None:
                each.do_not_compile = True
        self.backbones = tuple(backbones)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> Any:
        """The output of the backbone, with the gate's scalings."""
        backbone, scaling = self.backbones
        following, num_tokens = self.following, positions.shape[-1]
        if scaling is None:
            following.begin(num_tokens)
        else:
            following.read(num_tokens)
            hidden = scaling(input_ids, positions, intermediate_tensors, inputs_embeds)
            short = following.options.get("scaling_pass_layers") is not None
            following.ask(hidden, normalise=short)
        output = backbone(input_ids, positions, intermediate_tensors, inputs_embeds)
        following.end()
        return output

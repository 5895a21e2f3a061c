"""Scaling pass and adapted pass in one call of the model, so that vLLM schedules, caches and compiles them as one.

The scaling pass is a second backbone that has everything of the first one but its attention modules: these register
with vLLM by themselves and get key/value blocks of their own.
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
# What vLLM's models call their backbone, and a backbone its decoder layers and the norm behind them.
_BACKBONES = ("model", "transformer", "gpt_neox", "backbone")
_LAYERS = ("layers", "h", "blocks")
_NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Decoder:
    """Where a backbone has its decoder layers.

    Attributes:
        owner: the module that has them.
        layers: by which name.
        norm: the name of the norm behind them; None where there is none.
    """

    owner: Any
    layers: str
    norm: str | None


def backbone_of(model: nn.Module) -> nn.Module:
    """The part of a model of vLLM that gives the last hidden state.

    Raises:
        ConfigError: it is not where vLLM's text models have it.
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
    """Where the decoder layers are.

    Raises:
        ConfigError: under none of the known names.
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
    """In the place of a backbone's last norm: the residual stream as it is, which a short scaling pass reads."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        """The sum of the two parts that vLLM's layers hand on; a pair where the norm gives one."""
        return hidden if residual is None else (hidden + residual, None)


def scaling_backbone(vllm_config: Any, backbone: nn.Module, num_layers: int | None) -> nn.Module:
    """A backbone that shares all weights with the given one, and whose attention has caches of its own.

    Args:
        vllm_config: of the engine.
        backbone: the model's, such as vLLM's `LlamaModel`.
        num_layers: of a short scaling pass; None for all.
    """
    known = vllm_config.compilation_config.static_forward_context
    before = set(known)
    with torch.device("meta"):  # or memory would double while the model loads
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
    """Give a second instance everything of the first but its attention modules."""
    twin._parameters, twin._buffers = module._parameters, module._buffers
    for name, child in list(twin.named_children()):
        if isinstance(child, AttentionLayerBase):
            _take_tensors(child, getattr(module, name))
        elif any(isinstance(part, AttentionLayerBase) for part in child.modules()):
            _share(child, getattr(module, name))
        else:
            twin._modules[name] = getattr(module, name)


def _take_tensors(attention: nn.Module, other: nn.Module) -> None:
    """Give an attention module, which was made without memory, the other's scales of keys and values and the like."""
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
    """Both passes as one function, of which torch.compile makes one graph; the backbones do not compile themselves.

    Args:
        vllm_config: of the engine.
        prefix: vLLM's.
        backbone: of the adapted pass.
        scaling: of the scaling pass; None where the gate reads in the only pass.
        following: the gate, and what the layers follow.
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
        # In a tuple, which hides them from named_modules: they are the model's.
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
        """What the backbone gives, its layers following the gate."""
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

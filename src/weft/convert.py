"""peft's LoRA layers become layers that mix their experts by scalings."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import nn

from weft.config import XLoraConfig
from weft.errors import AdapterError
from weft.experts import own_tensors, refuse_variant
from weft.layers import XLoraConv2dLayer, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer

_LAYER_CLASSES: dict[type[LoraLayer], type[XLoraLayer]] = {
    lora.Linear: XLoraLinearLayer,
    lora.Embedding: XLoraEmbeddingLayer,
    lora.Conv2d: XLoraConv2dLayer,
}


def convert_layers_to_xlora(base: nn.Module, xloramodel: nn.Module, config: XLoraConfig) -> int:
    """Let every LoRA layer of the base model mix its experts by scalings.

    Layers are numbered in the order of `base.modules()`, which is the order of the layer axis of the scalings.

    Args:
        base: a model with peft's LoRA layers in it.
        xloramodel: the X-LoRA model, whose `carrier` the layers read.
        config: its options.

    Returns:
        How many layers were converted.

    Raises:
        AdapterError: a LoRA layer is of a class that X-LoRA does not support, or an adapter is no plain LoRA; nothing
            is converted then.
    """
    layers: list[XLoraLayer] = []
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer_class = _LAYER_CLASSES.get(type(module))
        if layer_class is None:
            kinds = ", ".join(f"lora.{kind.__name__}" for kind in _LAYER_CLASSES)
            raise AdapterError(
                f"layer {name!r} is adapted as {type(module).__module__}.{type(module).__name__}, which X-LoRA does "
                f"not support: expected one of {kinds}"
            )
        for adapter in module.active_adapters:
            refuse_variant(module, adapter)
        forward = module.forward  # type: ignore[attr-defined]
        layers.append(layer_class(xloramodel, module, forward, len(layers), config))
    for layer in layers:
        # At once, not at the first forward: what wraps the model (DDP) must see the parameters as they will stay.
        layer.experts.refresh()
        layer.target.register_state_dict_post_hook(own_tensors)
        layer.target.register_load_state_dict_post_hook(restack)
        layer.target.forward = layer.forward
    return len(layers)


def restack(target: Any, incompatible_keys: Any = None, *, own: bool = True) -> None:
    """Stack a converted layer's experts anew if their storage changed; compiled graphs cannot see for themselves.

    A hook for what loads a layer's state. With `own` False their storage stays what it is.
    """
    target.forward.__self__.experts.refresh(own=own)

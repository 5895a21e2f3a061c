"""Converts peft's LoRA layers to layers that mix their experts by scalings.

peft's classes are recognised by name: peft defines the classes of quantised layers only if their library is installed,
and weft imports none of these libraries.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from weft.config import XLoraConfig
from weft.errors import AdapterError
from weft.layers import XLoraConv2dLayer, XLoraEmbeddingLayer, XLoraLayer, XLoraLinearLayer
from weft.layers.dora import refuse_base_of_dora
from weft.layers.experts import StackedExperts, own_tensors, refuse_variant

_PEFT = "peft.tuners.lora."
# Module and class in peft.tuners.lora -> weft's layer. All linear classes add B A x to the output of their base layer,
# however its weights are stored.
CONVERTED: dict[str, type[XLoraLayer]] = {
    "layer.Linear": XLoraLinearLayer,
    "layer.Embedding": XLoraEmbeddingLayer,
    "layer.Conv2d": XLoraConv2dLayer,
    "bnb.Linear4bit": XLoraLinearLayer,
    "bnb.Linear8bitLt": XLoraLinearLayer,
    "torchao.TorchaoLoraLinear": XLoraLinearLayer,
    "gptq.GPTQLoraLinear": XLoraLinearLayer,
    "awq.AwqLoraLinear": XLoraLinearLayer,
    "hqq.HqqLoraLinear": XLoraLinearLayer,
    "eetq.EetqLoraLinear": XLoraLinearLayer,
    "aqlm.AqlmLoraLinear": XLoraLinearLayer,
    "inc.IncLoraLinear": XLoraLinearLayer,
}
# Classes that are not supported, and the reason, which follows "which X-LoRA does not support: ".
REFUSED: dict[str, str] = {
    "layer.Conv1d": "experts in a one-dimensional convolution have no weights per token",
    "layer.Conv3d": "experts in a three-dimensional convolution have no weights per token",
    "layer.MultiheadAttention": "its experts are merged into the weights, which are the same for all tokens",
    "layer.ParamWrapper": "its experts are merged into the weights of the base model's own experts, which are the same "
    "for all tokens",
    "te.TeLinear": "a layer of TransformerEngine may normalise its input, or be a whole MLP",
    "tp_layer.LoraParallelLinear": "Megatron spreads one layer's experts over several processes",
}


def convert_layers_to_xlora(base: nn.Module, xloramodel: nn.Module, config: XLoraConfig) -> int:
    """Replace the forward of each LoRA layer of the base model by one that mixes its experts by scalings.

    Layers are numbered in the order of `base.modules()`, which is the order of the layer axis of the scalings.

    Args:
        base: a model with peft's LoRA layers.
        xloramodel: the X-LoRA model; the layers read its `carrier`.
        config: its options.

    Returns:
        The number of layers.

    Raises:
        AdapterError: X-LoRA does not support the class of a LoRA layer, or the variant of an adapter; no layer is
            converted then.

    Example:
        >>> lora_model = LoraModel(nn.Sequential(nn.Linear(16, 32)), LoraConfig(target_modules=["0"]), "a")
        >>> convert_layers_to_xlora(lora_model.model, lora_model, XLoraConfig(adapters={"a": "adapters/a"}))
        1
    """
    layers: list[XLoraLayer] = []
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        layer_class = _layer_class(name, module)
        for adapter in module.active_adapters:
            refuse_variant(module, adapter, allow_dora=config.allow_dora)
        refuse_base_of_dora(module, name, module.active_adapters)
        forward = module.forward  # type: ignore[attr-defined]
        layers.append(layer_class(xloramodel, module, forward, len(layers), config))
    for layer in layers:
        # Now and not in the first forward: wrappers such as DDP must see the final storage of the parameters.
        layer.prepare()
        layer.target.register_state_dict_post_hook(own_tensors)
        layer.target.register_load_state_dict_post_hook(restack)
        layer.target.forward = layer.forward
    return len(layers)


def linear_experts(target: Any) -> StackedExperts | None:
    """The stacked experts of a converted linear layer; None for layers of other kinds."""
    layer = _layer_of(target)
    return layer.experts if isinstance(layer, XLoraLinearLayer) else None


def mixture_of(target: Any) -> nn.Module | None:
    """The X-LoRA model of a converted LoRA layer; None if the layer is not converted."""
    forward = target.forward
    while not isinstance(getattr(forward, "__self__", None), XLoraLayer) and hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    layer = getattr(forward, "__self__", None)
    return layer.model if isinstance(layer, XLoraLayer) else None


def _layer_of(target: Any) -> XLoraLayer:
    """weft's layer of a converted LoRA layer."""
    forward = target.forward
    while not isinstance(getattr(forward, "__self__", None), XLoraLayer):
        forward = forward.__wrapped__  # wrapped by tools such as accelerate's hooks
    return forward.__self__


def _layer_class(name: str, module: LoraLayer) -> type[XLoraLayer]:
    """weft's class for a LoRA layer of peft.

    Raises:
        AdapterError: the class of the LoRA layer is not supported.
    """
    full_name = f"{type(module).__module__}.{type(module).__qualname__}"
    layer_class = CONVERTED.get(full_name.removeprefix(_PEFT))
    if layer_class is None:
        reason = REFUSED.get(full_name.removeprefix(_PEFT), "it is unknown here what it computes")
        known = ", ".join(kind.partition(".")[2] for kind in CONVERTED)
        raise AdapterError(
            f"layer {name!r} is adapted as {full_name}, which X-LoRA does not support: {reason}; expected one of "
            f"{known}. Leave this layer out of the adapters' target_modules"
        )
    return layer_class


def restack(target: Any, incompatible_keys: Any = None, *, own: bool = True) -> None:
    """Stack a converted layer's experts again if their storage has changed, which compiled graphs cannot detect.

    It is also the hook that runs after a state dict is loaded. `own`: see `StackedExperts.refresh`.
    """
    _layer_of(target).prepare(own=own)

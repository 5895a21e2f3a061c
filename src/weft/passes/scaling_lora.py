"""The linear layers of a scaling pass, to which the gate's own LoRA adds (see `gate/scaling_lora.py`)."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from weft.base_model.backbone import Backbone
from weft.config import XLoraConfig
from weft.errors import ConfigError


def linear_layers(backbone: Backbone, number: int) -> dict[str, nn.Module]:
    """name -> module of each linear layer in the first decoder layers, in the order of the model.

    Args:
        backbone: the backbone, with or without LoRA layers in it.
        number: number of decoder layers.
    """
    inside = {id(part) for layer in list(backbone.decoder_layers())[:number] for part in layer.modules()}
    found: dict[str, nn.Module] = {}
    for name, module in backbone.base.named_modules():
        if id(module) in inside and isinstance(_base_layer(module), (nn.Linear, Conv1D)):
            if any(name.startswith(f"{outer}.") for outer in found):
                continue  # a part of a LoRA layer
            found[name] = module
    return found


def widths(backbone: Backbone, config: XLoraConfig) -> dict[str, tuple[int, int]] | None:
    """name -> (input, output) width of each layer that the gate's LoRA adapts; None without `scaling_pass_rank`.

    Raises:
        ConfigError: there is no such layer.
    """
    if config.scaling_pass_rank is None:
        return None
    assert config.scaling_pass_layers is not None
    found = {name: _widths(layer) for name, layer in linear_layers(backbone, config.scaling_pass_layers).items()}
    if not found:
        raise ConfigError(
            f"scaling_pass_rank ({config.scaling_pass_rank}) needs linear layers in the first "
            f"{config.scaling_pass_layers} decoder layers, and {type(backbone.base).__name__} has none that torch or "
            "transformers know as such: leave it out"
        )
    return found


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _widths(module: nn.Module) -> tuple[int, int]:
    layer: Any = _base_layer(module)
    if isinstance(layer, Conv1D):
        inputs, outputs = layer.weight.shape
        return inputs, outputs
    return layer.in_features, layer.out_features

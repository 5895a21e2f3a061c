"""Where in a base model the gate reads, and which LoRA layers follow it."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from weft.backbone import Backbone
from weft.config import XLoraConfig
from weft.errors import ConfigError


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

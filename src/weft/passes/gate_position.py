"""The position of the gate in a base model, and the LoRA layers that can use its scalings."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer

from weft.base_model.backbone import Backbone
from weft.config import XLoraConfig
from weft.errors import AdapterError, ConfigError


def first_following_layer(backbone: Backbone, config: XLoraConfig) -> int:
    """Number of the first LoRA layer that uses the gate's scalings; 0 without `gate_layer`.

    Raises:
        ConfigError: the base model has no such `gate_layer` or `scaling_pass_layers`, or no LoRA layer after it.
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


def refuse_layers_beside_text(backbone: Backbone) -> None:
    """Raise if a layer of an image or sound encoder is adapted.

    Its input has no tokens of the text. The mean over the text's scalings would not be causal: the features of an image
    would depend on later tokens, and could not be cached.

    Raises:
        AdapterError: there is such a layer.
    """
    base, text_model = backbone.base, backbone.text_model
    if text_model is None:
        return
    placed = {*text_model.modules(), base.get_input_embeddings(), base.get_output_embeddings()}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer) and module not in placed:
            raise AdapterError(
                f"layer {name!r} is adapted by {list(module.active_adapters)}, but lies outside of the text model "
                f"({type(text_model).__name__}), so that it has no tokens whose scalings it could follow: expected "
                "adapters of the text model only (peft's exclude_modules keeps others out)"
            )

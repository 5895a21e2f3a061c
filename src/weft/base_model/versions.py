"""Differences between the versions of transformers and peft that pyproject.toml allows.

Each part names the version from which it is not needed. (The name of the cache argument is found by `Backbone`.)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, TrainingArguments
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

_RECORDS_PAST = hasattr(Cache, "activate_past_recording")  # since 5.14
# Before 5.18, distributed training on the CPU resumes with map_location "cpu:0", which torch does not know.
torch.serialization.register_package(
    15, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)
_TRAINING = {field.name for field in dataclasses.fields(TrainingArguments)}


def is_recurrent(cache: Cache) -> bool:
    """Whether a cache has only recurrent states. Since 5.14 this is `is_linear` of all its layers."""
    layers = getattr(cache, "layers", [])
    return bool(layers) and not any(isinstance(layer, CacheLayerMixin) for layer in layers)


def can_crop(cache: Cache) -> bool:
    """Whether `crop` can remove the tokens after `keep_for_crop` from the cache. Since 5.17: `is_croppable`."""
    known = getattr(cache, "is_croppable", None)
    if known is not None:
        return bool(known)
    # Before 5.17, layers of other kinds silently keep the tokens.
    return isinstance(cache, DynamicCache) and all(
        type(layer) is DynamicLayer or hasattr(layer, "activate_past_recording") for layer in cache.layers
    )


def croppable(cache: DynamicCache) -> DynamicCache:
    """The new cache, or one that can be cropped: before 5.16 without sliding windows, which the mask also applies."""
    windows = all(isinstance(layer, DynamicLayer) for layer in cache.layers)
    return DynamicCache() if windows and not can_crop(cache) else cache


def keep_for_crop(cache: Cache) -> None:
    """Let sliding windows and recurrent states keep from here on what a `crop` needs."""
    if _RECORDS_PAST:
        cache.activate_past_recording()


def forget(cache: Cache, number: int) -> None:
    """Remove the last `number` tokens from the cache. With 0, only drop what `keep_for_crop` kept.

    Before 5.14, crop(0) would remove all tokens.
    """
    if number > 0 or _RECORDS_PAST:
        cache.crop(-number)


def drop_grown_layers(cache: Cache) -> None:
    """Complete a `reset`: before 5.18, growing layers keep zeros, which count as tokens."""
    parts: tuple[Cache, ...] = (cache,)
    if isinstance(cache, EncoderDecoderCache):
        parts = (cache.self_attention_cache, cache.cross_attention_cache)
    layer: Any
    for layer in (layer for part in parts for layer in part.layers):
        if isinstance(layer, DynamicLayer):
            layer.keys = layer.values = None
            layer.is_initialized = False


def cast_like_base_layer(layer: LoraLayer, name: str, device: torch.device | None) -> None:
    """Move an adapter to its base layer's dtype and to a device; None takes the layer's device.

    peft 0.18 cannot move to another device.
    """
    if device is None:
        layer._move_adapter_to_device_of_base_layer(name)
        return
    weight: Any = layer.get_base_layer().weight
    dtype = weight.dtype if weight.is_floating_point() else None
    for attribute in layer.adapter_layer_names:
        factors = getattr(layer, attribute)
        if name in factors:
            factors[name] = factors[name].to(device=device, dtype=dtype)


def kept_by_name(layer: LoraLayer) -> tuple[str, ...]:
    """The attributes of a LoRA layer with an entry for each adapter. Before 0.20, peft does not list all of them."""
    unlisted = ("lora_magnitude_vector", "use_dora", "use_rslora", "lora_bias", "lora_variant")
    return tuple(dict.fromkeys((*layer.adapter_layer_names, *layer.other_param_names, *unlisted)))


def with_current_names(weights: dict[str, Tensor], base: Any, config: LoraConfig, name: str) -> dict[str, Tensor]:
    """An adapter's weights under the base model's present layer names, if transformers has renamed the layers.

    peft 0.18 has no such renaming.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
    except ModuleNotFoundError:
        return weights
    return convert_peft_adapter_state_dict_for_transformers(
        model=base, peft_config=config, adapter_state_dict=dict(weights), adapter_name=name
    )


def with_none_missing(loaded: Any) -> Any:
    """The result of `_load_pretrained_model` without missing keys. Before 5.1 it is the report, else a tuple."""
    report = loaded[0] if isinstance(loaded, tuple) else loaded
    report.missing_keys = set()
    return loaded


def let_peft_ask() -> None:
    """Let peft call the tuner's hooks for saving and loading a state dict, as it does since 0.21."""
    if hasattr(BaseTuner, "_get_adapter_state_dict"):
        return
    for name, asking in (
        ("get_peft_model_state_dict", _asking_what_to_save),
        ("set_peft_model_state_dict", _telling_what_is_loaded),
    ):
        function = asking(getattr(save_and_load, name))
        for module in (peft, peft.utils, save_and_load, peft.peft_model, peft.mapping_func):
            if hasattr(module, name):
                setattr(module, name, function)


def _asking_what_to_save(get: Any) -> Any:
    @functools.wraps(get)
    def asking(model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        config = model.peft_config[adapter_name]
        tuner: Any = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if not hasattr(tuner, "_get_adapter_state_dict"):
            return get(model, state_dict, adapter_name, *args, **kwargs)
        state_dict = model.state_dict() if state_dict is None else state_dict
        own = tuner._get_adapter_state_dict(model, config, adapter_name, state_dict)
        gates = {key for key in state_dict if "internal_xlora_classifier" in key}
        rest = get(model, state_dict, adapter_name, *args, **kwargs)
        return {**own, **{key: value for key, value in rest.items() if key not in gates}}

    return asking


def _telling_what_is_loaded(load: Any) -> Any:
    @functools.wraps(load)
    def telling(model: Any, state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any) -> Any:
        config = model.peft_config[adapter_name]
        tuner: Any = peft.PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
        if hasattr(tuner, "_remap_adapter_state_dict_for_load"):
            state_dict = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return load(model, state_dict, adapter_name, *args, **kwargs)

    return telling


def checkpointing_arguments(options: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of `TrainingArguments` for gradient checkpointing, which 5.23 renamed; None turns it off."""
    name = "activation_checkpointing" if "activation_checkpointing" in _TRAINING else "gradient_checkpointing"
    return {name: options is not None, f"{name}_kwargs": options}


def length_grouping_arguments(group: bool) -> dict[str, Any]:
    """The argument of `TrainingArguments` that groups texts of similar length; it was another one before 5.2."""
    if "train_sampling_strategy" in _TRAINING:
        return {"train_sampling_strategy": "group_by_length" if group else "random"}
    return {"group_by_length": group}


def groups_by_length(args: TrainingArguments) -> bool:
    """Whether these arguments group texts of similar length."""
    return all(getattr(args, name) == value for name, value in length_grouping_arguments(True).items())

"""Adds LoRA adapters to a base model as experts, and removes them.

peft makes the parameters, and the tensors that `checkpoint/adapters.py` has read are copied into them. If one tensor
does not fit, the adapter is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from weft.base_model.devices import execution_device, is_offloaded
from weft.base_model.versions import kept_by_name, with_current_names
from weft.checkpoint.adapter_keys import KEY_PREFIX, fitted
from weft.checkpoint.adapters import Adapter, different_bases, model_name
from weft.errors import AdapterError, bullet_list
from weft.files.reading import is_finite_in_float32
from weft.files.tensors import not_finite, preview

_LAYER = re.compile(r"\.(\d+)\.")  # the number of a layer in a key, the first one
_SHOWN = 3  # keys that do not fit, of each kind


def inject_adapters(base: nn.Module, adapters: list[Adapter]) -> LoraModel:
    """Add the adapters to the base model's layers. Parameters in half precision are cast to float32.

    They are cast before the values are copied, so that values from float32 files are not rounded in a bfloat16 model.

    Raises:
        AdapterError: an adapter's targets or tensors do not fit this base model. The caller restores the base model.
    """
    lora_model: LoraModel | None = None
    aside: list[tuple[Any, str, Any]] = []
    for adapter in adapters:
        config = adapter.config
        config.inference_mode = False
        try:
            if lora_model is None:
                lora_model = LoraModel(base, {adapter.name: config}, adapter.name)
            else:
                lora_model.peft_config[adapter.name] = config
                lora_model.inject_adapter(base, adapter.name)
            if not dict(adapter_parameters(base, adapter.name)):  # peft before 0.21 checks only the first adapter
                raise ValueError(f"target modules {config.target_modules} not found in the base model")
        except torch.OutOfMemoryError:
            raise
        except Exception as err:  # depends on the options and the kind of layer
            raise AdapterError(f"{_misfit(base, adapter, adapter.folder)}: {err}") from err
        remove_wrappers(base)  # peft's wrappers around full modules of the adapter, which are not used in a mixture
        lora_model._cast_adapter_dtype(adapter_name=adapter.name, autocast_adapter_dtype=True)
        _leave_meta(base, adapter.name)
        _fill(base, adapter)
        aside += _set_aside(base, adapter.name)
    for container, name, part in aside:
        container[name] = part
    assert lora_model is not None
    return lora_model


def _set_aside(base: nn.Module, name: str) -> list[tuple[Any, str, Any]]:
    """Take an adapter out of its layers: for each part of it, its container there, its name and itself.

    peft and weft visit all modules of the base model for each adapter. With those of the adapters before, the time
    would grow with the square of their number.
    """
    found: list[tuple[Any, str, Any]] = []
    for _, layer in lora_layers(base):
        found += [(container, name, container[name]) for container in containers(layer) if name in container]
    for container, _, _ in found:
        del container[name]
    return found


def _leave_meta(base: nn.Module, name: str) -> None:
    """Allocate an adapter on the execution device of offloaded layers; peft makes it on the meta device."""
    for _, module in lora_layers(base):
        if not is_offloaded(module.get_base_layer()):
            continue
        device = execution_device(module.get_base_layer())
        for attribute in ("lora_A", "lora_B"):
            factors = getattr(module, attribute)
            if name in factors:
                factors[name].to_empty(device=device)
        for attribute in ("lora_embedding_A", "lora_embedding_B"):
            factors = getattr(module, attribute)
            if name in factors:
                factors[name] = nn.Parameter(torch.empty_like(factors[name], device=device))


def warn_of_different_bases(base: nn.Module, adapters: list[Adapter]) -> None:
    """Warn if the adapters name different base models although all of them fit this one."""
    named = different_bases(adapters)
    if named is not None:
        warnings.warn(
            f"the adapters name different base models ({named}): all of their tensors fit this one "
            f"({getattr(base, 'name_or_path', None) or type(base).__name__}), which is taken for theirs",
            stacklevel=2,
        )


def remove_adapters(base: nn.Module) -> None:
    """Replace all LoRA layers and wrapped modules by the base model's own modules."""
    remove_wrappers(base)
    layers = dict(lora_layers(base))
    for name, module in layers.items():
        parent, _, attribute = name.rpartition(".")
        if parent not in layers:  # else nested LoRA layers around one base layer, as peft makes for single parameters
            setattr(base.get_submodule(parent), attribute, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def remove_wrappers(base: nn.Module) -> None:
    """Replace peft's wrappers of fully trained modules by the base model's own modules."""
    for name, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            parent, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(parent), attribute, module.original_module)


def lora_layers(base: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(path, layer) of the base model's LoRA layers, in the order of `named_modules`; the adapters are not visited."""
    waiting: list[tuple[str, nn.Module]] = [("", base)]
    seen: set[nn.Module] = set()
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        children = list(module.named_children())
        if isinstance(module, LoraLayer):
            yield path, module
            of_adapters = containers(module)
            children = [(name, child) for name, child in children if all(child is not one for one in of_adapters)]
        waiting += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children)]


def containers(layer: LoraLayer) -> list[Any]:
    """The dicts of a LoRA layer that have an entry for each adapter."""
    found = [getattr(layer, name) for name in kept_by_name(layer)]
    return [one for one in found if isinstance(one, (dict, nn.ModuleDict, nn.ParameterDict))]


def adapter_parameters(base: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """(key in an adapter file, parameter) for all parameters of adapter `name` in the base model."""
    for layer_name, module in lora_layers(base):
        for attribute in ("lora_A", "lora_B"):
            factors = getattr(module, attribute)
            if name in factors:
                for parameter_name, parameter in factors[name].named_parameters():
                    yield f"{KEY_PREFIX}{layer_name}.{attribute}.{parameter_name}", parameter
        for attribute in ("lora_embedding_A", "lora_embedding_B"):
            factors = getattr(module, attribute)
            if name in factors:
                yield f"{KEY_PREFIX}{layer_name}.{attribute}", factors[name]
        if name in module.lora_magnitude_vector:
            magnitude = module.lora_magnitude_vector[name].get_parameter("weight")
            yield f"{KEY_PREFIX}{layer_name}.lora_magnitude_vector", magnitude


def _fill(base: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into its parameters. If one does not fit, none is copied."""
    parameters = dict(adapter_parameters(base, adapter.name))
    weights = fitted(adapter.weights, parameters)
    if weights.keys() != parameters.keys():
        weights = converted(base, adapter, weights)
    problems = key_problems(weights, parameters)
    if any(parameter.is_meta for parameter in parameters.values()):
        problems.append(
            "its parameters are on the meta device: load with low_cpu_mem_usage=False, and with weft.from_pretrained "
            "where the base model is offloaded to disk"
        )
    if problems:
        rows = {len(value.T) for key, value in weights.items() if key.endswith("lora_embedding_A")}
        if rows - {len(value.T) for key, value in parameters.items() if key.endswith("lora_embedding_A")}:
            problems.insert(
                0,
                f"it was trained with embeddings of {max(rows)} tokens: call "
                f"model.resize_token_embeddings({max(rows)}) first",
            )
        what = _misfit(base, adapter, adapter.folder / SAFETENSORS_WEIGHTS_NAME, _sizes(base, weights, parameters))
        raise AdapterError(f"{what}:{bullet_list(problems)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
    refuse_not_finite(base, adapter.name)


def _misfit(base: nn.Module, adapter: Adapter, file: Path, widths: str = "") -> str:
    """That an adapter does not fit, and why as far as names and widths tell it."""
    if another := of_another_base(base, adapter, widths):
        return f"{another}{file}"
    if widths:
        return f"adapter {adapter.name!r} does not fit the base model: {widths}. {file}"
    return f"adapter {adapter.name!r} ({file}) does not fit the base model"


def of_another_base(base: nn.Module, adapter: Adapter, widths: str = "") -> str:
    """A sentence for an adapter that says that it was trained for another base model; "" for others."""
    made_for, given = str(adapter.config.base_model_name_or_path or ""), getattr(base, "name_or_path", None) or ""
    if not made_for or not given or model_name(made_for) == model_name(given):
        return ""
    why = f": {widths} ({given})" if widths else f", not for {given}"
    return f"adapter {adapter.name!r} is made for the base model {made_for}{why}. "


def _sizes(base: nn.Module, weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> str:
    """Where the adapter's tensors show another hidden size or number of layers than the base model's: which."""
    return ", ".join(filter(None, (_widths(base, weights, parameters), _depths(weights, parameters))))


def _depths(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> str:
    """ "4 layers, here 2", where an adapter has tensors of layers above the base model's last one."""
    found = [[int(match[1]) for key in keys if (match := _LAYER.search(key))] for keys in (weights, parameters)]
    most = [max(numbers, default=-1) for numbers in found]
    return f"{most[0] + 1} layers, here {most[1] + 1}" if most[0] > most[1] >= 0 else ""


def _widths(base: nn.Module, weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> str:
    """ "hidden size 64, here 48", where the adapter's tensors are all of another hidden size than the base model."""
    config: Any = getattr(base, "config", None)
    own = getattr(config.get_text_config(), "hidden_size", None) if hasattr(config, "get_text_config") else None
    found = {
        weights[key].shape[-1]
        for key, parameter in parameters.items()
        if key.endswith("lora_A.weight") and parameter.dim() == 2 and parameter.shape[1] == own and key in weights
    }
    return f"hidden size {found.pop()}, here {own}" if len(found) == 1 and own not in found else ""


def refuse_not_finite(base: nn.Module, name: str) -> None:
    """Raise if an adapter has NaN or infinite values in the base model, for example after a cast to a narrower dtype.

    Raises:
        AdapterError: it has such values.
    """
    broken = not_finite(dict(adapter_parameters(base, name)))
    scalings = {
        path: module.scaling[name]
        for path, module in lora_layers(base)
        if not is_finite_in_float32(module.scaling.get(name, 0))
    }
    if scalings:
        path, value = next(iter(scalings.items()))
        broken = f"its scaling in {path} is {value} (from lora_alpha and r in its config)"
    if broken:
        raise AdapterError(f"adapter {name!r} is broken in this model, as {broken}: expected finite numbers")


def key_problems(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> list[str]:
    """The missing keys, unexpected keys and wrong shapes, as separate sorted lists; empty if the tensors fit."""
    missing = sorted(parameters.keys() - weights.keys())
    unexpected = sorted(weights.keys() - parameters.keys())
    problems = []
    if missing:
        problems.append(f"missing keys ({len(missing)}): {preview(missing, _SHOWN)}")
    if unexpected:
        problems.append(f"unexpected keys ({len(unexpected)}): {preview(unexpected, _SHOWN)}")
    shapes = [
        f"{key} has shape {list(weights[key].shape)}, expected {list(parameters[key].shape)}"
        for key in sorted(weights.keys() & parameters.keys())
        if weights[key].shape != parameters[key].shape
    ]
    problems += shapes[:_SHOWN]
    if len(shapes) > _SHOWN:
        problems.append(f"and {len(shapes) - _SHOWN} more of other shapes")
    return problems


def converted(base: nn.Module, adapter: Adapter, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the present names of the base model's layers, if transformers has renamed them."""
    if not hasattr(getattr(base, "config", None), "model_type"):
        return weights
    converted = with_current_names(weights, base, adapter.config, adapter.name)
    return {KEY_PREFIX + key.removeprefix(KEY_PREFIX): value for key, value in converted.items()}

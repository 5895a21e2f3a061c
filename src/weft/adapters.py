"""Reading LoRA adapters from folders or the Hub, and putting them into a base model as experts.

Everything is read and checked before the base model is touched: an adapter is either wholly in or not at all. Only
safetensors files are read, nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from weft.errors import AdapterError, CheckpointError, ConfigError, bullet_list, first_line
from weft.experts import refuse_dora
from weft.placement import execution_device, is_offloaded, offloaded_weights

_SHOWN = 8  # keys in one message
KEY_PREFIX = "base_model.model."
# Options of a LoraConfig that change more than the layers' B A x, so that a mixture of several has no meaning (yet).
_UNMIXABLE = {
    "layer_replication": "replicates layers of the base model",
    "target_parameters": "adapts bare parameters",
    "trainable_token_indices": "trains embeddings of its own",
    "alora_invocation_tokens": "acts on a part of the text only",
}


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter as read from its folder; `heads` are tensors of whole modules, which do not act in a mixture."""

    name: str
    folder: Path
    config: LoraConfig
    weights: dict[str, Tensor]
    heads: dict[str, Tensor]


# Initialisations that take the adapter's start out of the base weights: such an adapter is of another base model.
_BASE_CHANGING_STARTS = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read_adapters(paths: dict[str, str], *, allow_dora: bool = False, heads: Sequence[str] = ()) -> list[Adapter]:
    """Read the adapters of one base model.

    Args:
        paths: name -> folder or Hub id, in the order of the gate's outputs.
        allow_dora: take adapters with DoRA too.
        heads: modules of the base model which the mixture has one of, so that adapters may have their own, which does
            not act.

    Raises:
        AdapterError: files are missing or unreadable, an adapter is no LoRA that can be mixed, or they are of different
            base models; all problems at once.
    """
    adapters: list[Adapter] = []
    problems: list[str] = []
    for name, path in paths.items():
        try:
            adapters.append(_read_adapter(name, path, allow_dora=allow_dora, heads=heads))
        except AdapterError as err:
            problems.append(str(err))
    problems += _base_model_problems(adapters)
    if problems:
        raise AdapterError(f"the adapters cannot be experts of one model:{bullet_list(problems)}")
    return adapters


def inject_adapters(base: nn.Module, adapters: list[Adapter]) -> LoraModel:
    """Put the adapters into the base model's layers, in float32 where they would be in half precision.

    The parameters are cast before they are filled, so that float32 files lose nothing in a bfloat16 model.

    Raises:
        AdapterError: an adapter's targets or tensors do not fit this base model. The caller restores the base model.
    """
    lora_model: LoraModel | None = None
    for adapter in adapters:
        config = adapter.config
        config.inference_mode = False
        try:
            if lora_model is None:
                lora_model = LoraModel(base, {adapter.name: config}, adapter.name)
            else:
                lora_model.peft_config[adapter.name] = config
                lora_model.inject_adapter(base, adapter.name)
        except (
            ValueError,
            TypeError,
        ) as err:  # a TypeError where peft knows the layers' quantisation, but not their LoRA
            raise AdapterError(
                f"adapter {adapter.name!r} ({adapter.folder}) does not fit the base model: {err}"
            ) from err
        remove_wrappers(base)  # peft's, around modules of the adapter's own: they do not act in a mixture
        lora_model._cast_adapter_dtype(adapter_name=adapter.name, autocast_adapter_dtype=True)
        _leave_meta(base, adapter.name)
        _fill(base, adapter)
    assert lora_model is not None
    return lora_model


def _leave_meta(base: nn.Module, name: str) -> None:
    """Bring an adapter to where its layers compute, whose own weights are offloaded; peft puts it beside these."""
    for module in base.modules():
        if not isinstance(module, LoraLayer) or not is_offloaded(module.get_base_layer()):
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


def remove_adapters(base: nn.Module) -> None:
    """Put the base layers back in the place of all LoRA layers, and of modules that are trained as a whole."""
    remove_wrappers(base)
    for name, module in list(base.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(parent), attribute, module.get_base_layer())
    if hasattr(base, "peft_config"):
        del base.peft_config


def remove_wrappers(base: nn.Module) -> None:
    """Put the base model's own modules back in the place of those that are trained as a whole."""
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            parent, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(parent), attribute, module.original_module)


def adapter_parameters(base: nn.Module, name: str) -> Iterator[tuple[str, Tensor]]:
    """(key in an adapter file, parameter) of everything adapter `name` has in the base model."""
    for layer_name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
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


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: there is no such file, or it is truncated or no safetensors file.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as err:
        raise CheckpointError(f"{file} is no whole safetensors file ({err}): copy it again") from err


def read_json(file: Path) -> dict:
    """A JSON object from a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as err:
        raise CheckpointError(f"{file} is no valid JSON ({err})") from err
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(values).__name__}")
    return values


def parse_adapters(
    values: list[str] | dict[str, str], option: str = "adapters", expected: str = "name=FOLDER or name=HUB_ID"
) -> dict[str, str]:
    """["math=DIR", ...] as {name: folder}.

    Raises:
        ConfigError: an entry is not as expected, or a name stands twice.
    """
    if isinstance(values, dict):
        return values
    adapters: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"{option} has the entry {value!r}, expected {expected}")
        if name in adapters:
            raise ConfigError(f"{option} has the name {name!r} twice ({adapters[name]} and {path})")
        adapters[name] = path
    return adapters


def local_folder(path: str, what: str) -> Path:
    """The folder itself, or a snapshot of the Hub id of that name (user/repository, or user/repository/folder).

    Raises:
        CheckpointError: neither is there.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    inside = re.fullmatch(r"([^/]+/[^/]+)/(.+?)/*", path)
    repository, below = (inside[1], f"{inside[2]}/") if inside else (path, "")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        wanted = [f"{below}{pattern}" for pattern in ("*.json", "*.safetensors", "*README.md")]
        return Path(snapshot_download(repository, allow_patterns=wanted)) / below
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as err:
        message = f"{what} ({path}) is neither a folder here nor a Hub id that can be read: {first_line(err)}"
        raise CheckpointError(message) from err


def _read_adapter(name: str, path: str, *, allow_dora: bool, heads: Sequence[str]) -> Adapter:
    try:
        folder = local_folder(path, f"adapter {name!r}")
    except CheckpointError as err:
        raise AdapterError(str(err)) from err
    try:
        values = read_json(folder / CONFIG_NAME)
        if values.get("peft_type") != "LORA":
            raise AdapterError(f"adapter {name!r} ({path}) is of type {values.get('peft_type')}, not LORA")
        config = _read_config(name, folder)
        if not (folder / SAFETENSORS_WEIGHTS_NAME).exists() and (folder / "adapter_model.bin").exists():
            raise AdapterError(
                f"adapter {name!r} ({path}) is saved as a pickle (adapter_model.bin), which weft does not open: "
                "save it again with peft, which writes safetensors"
            )
        weights = read_tensors(folder / SAFETENSORS_WEIGHTS_NAME)
    except CheckpointError as err:
        # From the Hub only safetensors are fetched, so that a pickle there looks like nothing.
        unfetched = not Path(path).is_dir() and not (folder / SAFETENSORS_WEIGHTS_NAME).exists()
        hint = "; weft does not fetch or open pickles (adapter_model.bin)" if unfetched else ""
        raise AdapterError(f"adapter {name!r}: {err}{hint}") from err
    if config.use_dora and not allow_dora:
        refuse_dora(name)
    _refuse_unmixable(name, config, has_heads=bool(heads))
    prefixes = tuple(f"{KEY_PREFIX}{path}." for path in heads)
    own = {key: weights.pop(key) for key in list(weights) if key.startswith(prefixes) and ".lora_" not in key}
    return Adapter(name, folder, config, weights, own)


def _read_config(name: str, folder: Path) -> LoraConfig:
    try:
        return LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as err:
        raise AdapterError(f"adapter {name!r}: peft refuses {folder / CONFIG_NAME}: {err}") from err


def _refuse_unmixable(name: str, config: LoraConfig, *, has_heads: bool) -> None:
    start = str(config.init_lora_weights).lower()
    if start.startswith(_BASE_CHANGING_STARTS):
        raise AdapterError(
            f"adapter {name!r} has init_lora_weights ({start!r}), which changes the base model's weights, and that "
            "cannot be mixed: save it again as a plain LoRA (peft's path_initial_model_for_weight_conversion)"
        )
    if config.modules_to_save and not has_heads:
        raise AdapterError(
            f"adapter {name!r} has modules_to_save ({config.modules_to_save!r}): it trains whole modules of its own, "
            "which cannot be mixed. The mixture can have such a module of its own in their place: name it in heads"
        )
    for option, what in _UNMIXABLE.items():
        value = getattr(config, option, None)
        if value:
            raise AdapterError(f"adapter {name!r} has {option} ({value!r}): it {what}, which cannot be mixed")
    if config.bias != "none":
        raise AdapterError(
            f"adapter {name!r} has bias ({config.bias!r}): it changes the base model's biases, which cannot be mixed; "
            "expected 'none'"
        )


def _base_model_problems(adapters: list[Adapter]) -> list[str]:
    """Adapters name their base model by a path or a Hub id; mirrors and moved folders keep the last part."""
    names = {adapter.name: adapter.config.base_model_name_or_path for adapter in adapters}
    by_base: dict[str, list[str]] = {}
    for name, base in names.items():
        if base:
            by_base.setdefault(_model_name(base), []).append(name)
    if len(by_base) < 2:
        return []
    described = "; ".join(f"{name!r} of {names[name]}" for group in by_base.values() for name in group)
    return [f"they are of different base models ({described}): expected one base model for all"]


def _model_name(base: str) -> str:
    """The last part of a base model's path or Hub id."""
    cached = re.search(r"models--([^/]+)", base)  # in the Hub's cache: .../models--org--model/snapshots/<commit>
    return (cached.group(1).split("--")[-1] if cached else Path(base).name).lower()


def _fill(base: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into its parameters, all of them or none."""
    parameters = dict(adapter_parameters(base, adapter.name))
    weights = _without_base_weights(base, adapter)
    if weights.keys() != parameters.keys():
        weights = _converted(base, adapter, weights)
    problems = key_problems(weights, parameters)
    if any(parameter.is_meta for parameter in parameters.values()):
        problems.append(
            "its parameters are on the meta device: load with low_cpu_mem_usage=False, and with weft.from_pretrained "
            "where the base model is offloaded to disk"
        )
    if problems:
        file = adapter.folder / SAFETENSORS_WEIGHTS_NAME
        made_for, given = adapter.config.base_model_name_or_path, getattr(base, "name_or_path", None)
        if made_for and given and _model_name(made_for) != _model_name(given):
            problems.append(f"it was made for the base model {made_for}, and this one is {given}")
        raise AdapterError(f"adapter {adapter.name!r} ({file}) does not fit the base model:{bullet_list(problems)}")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])


def key_problems(weights: dict[str, Tensor], parameters: dict[str, Tensor]) -> list[str]:
    """Missing keys, unexpected keys and wrong shapes, apart and sorted; empty where the tensors fit."""
    missing = sorted(parameters.keys() - weights.keys())
    unexpected = sorted(weights.keys() - parameters.keys())
    problems = []
    if missing:
        problems.append(f"missing keys ({len(missing)}): {_preview(missing)}")
    if unexpected:
        problems.append(f"unexpected keys ({len(unexpected)}): {_preview(unexpected)}")
    shapes = [
        f"{key} has shape {list(weights[key].shape)}, expected {list(parameters[key].shape)}"
        for key in sorted(weights.keys() & parameters.keys())
        if weights[key].shape != parameters[key].shape
    ]
    problems += shapes[:_SHOWN]
    if len(shapes) > _SHOWN:
        problems.append(f"and {len(shapes) - _SHOWN} more of other shapes")
    return problems


def _preview(keys: list[str]) -> str:
    shown = ", ".join(keys[:_SHOWN])
    return shown if len(keys) <= _SHOWN else f"{shown}, and {len(keys) - _SHOWN} more"


def _converted(base: nn.Module, adapter: Adapter, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of today's transformers, where the base model's layers were renamed since."""
    if not hasattr(getattr(base, "config", None), "model_type"):
        return weights
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    converted = convert_peft_adapter_state_dict_for_transformers(
        model=base, peft_config=adapter.config, adapter_state_dict=dict(weights), adapter_name=adapter.name
    )
    return {KEY_PREFIX + key.removeprefix(KEY_PREFIX): value for key, value in converted.items()}


def _without_base_weights(base: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Drop copies of the base model's own embeddings, which peft adds to adapters that target them."""
    base_weights: dict[str, Tensor] = dict(base.named_parameters(remove_duplicate=False))
    kept = {}
    for key, value in adapter.weights.items():
        name = key.removeprefix(KEY_PREFIX)
        own = base_weights.get(name)
        if own is not None and own.is_meta:
            path, _, attribute = name.rpartition(".")
            own = offloaded_weights(base.get_submodule(path)).get(attribute)
        if own is None:
            kept[key] = value
        elif own.shape != value.shape or not _equal_in_either_dtype(own.cpu(), value.cpu()):
            raise AdapterError(
                f"adapter {adapter.name!r} carries its own {key}, which differs from the base model's: an adapter with "
                "retrained or resized embeddings or other modules cannot be mixed"
            )
    return kept


def _equal_in_either_dtype(own: Tensor, other: Tensor) -> bool:
    return torch.equal(own.to(other.dtype), other) or torch.equal(other.to(own.dtype), own)

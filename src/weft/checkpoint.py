"""The self-contained folder: gate, experts and options of one mixture.

    adapter_config.json           the options (peft's X-LoRA config): names and layers in order, relative paths
    adapter_model.safetensors     gate and heads, under peft's keys (and copies of trained experts, for tools to resume)
    weft_manifest.json            digests of all tensors, and of the experts' configs
    experts/math/                 each expert, an ordinary peft adapter: adapter_config.json, adapter_model.safetensors

The experts lie one level down because transformers' Trainer takes adapters right below a checkpoint for further
adapters of the same model, and fails to resume. Folders that peft's X-LoRA wrote are read too: they have no manifest,
and their experts lie wherever their config says. So are those of the original xlora library (`original.py`).
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from weft.adapter_keys import without_wrappers
from weft.adapters import local_folder
from weft.config import XLoraConfig, config_json, unknown_option_problems
from weft.errors import CheckpointError, ConfigError, bullet_list
from weft.files import JsonTable, kind_shown, read_json, shown
from weft.frozen_copies import refuse_frozen_copy
from weft.gate_files import refuse_other_sizes
from weft.heads import head_tensors
from weft.injection import adapter_parameters, key_problems
from weft.licences import CARD, keep_own_card
from weft.manifest import (
    EXPERTS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_NAME,
    manifest_of,
    refuse_strangers_folder,
    verify,
)
from weft.names import name_problems
from weft.original import (
    ORIGINAL_CONFIG,
    ORIGINAL_GATE,
    is_original,
    original_base,
    original_options,
    read_original_gate,
)
from weft.processes import is_sharded
from weft.tensor_files import not_finite, read_tensors
from weft.whole import errors_of_writing, replace_file, replace_folder, settle

GATE_KEY = "internal_xlora_classifier."
# In the names of an expert's parameters.
_EXPERT_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.", ".lora_magnitude_vector.")
# Arguments of peft's own loading that are about fetching, not about the options.
_FETCHING = {"revision", "cache_dir", "token", "use_auth_token", "ephemeral_gpu_offload", "torch_device"}


def save_whole(model: PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """peft's `save_pretrained`, after which the folder holds all of the model, or else what it held before.

    A README.md that a person wrote stays as it is.

    Raises:
        ConfigError: the folder holds something that is no mixture's and would be replaced.
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    folder = Path(save_directory)
    save = type(model).save_pretrained
    tuner: Any = model.base_model
    for name in kwargs.get("selected_adapters") or ():
        refuse_frozen_copy(model, name)
    kwargs.setdefault("selected_adapters", [tuner.mixture_name])
    if kwargs.get("state_dict") is not None:
        kwargs["state_dict"] = {without_wrappers(key): value for key, value in kwargs["state_dict"].items()}
    kwargs.setdefault("save_embedding_layers", False)  # the experts are saved with what they brought
    if not kwargs.get("is_main_process", True):
        save(model, str(folder), *args, **kwargs)
        return
    settle(folder)
    refuse_strangers_folder(folder)
    card = folder / CARD

    def write(part: Path) -> None:
        if os.path.isfile(card):
            shutil.copy(card, part / CARD)
        save(model, str(part), *args, **kwargs)
        keep_own_card(folder, part)

    replace_folder(folder, write, CONFIG_NAME)


def write_config(config: XLoraConfig, folder: Path, auto_mapping: dict[str, str] | None = None) -> None:
    """Write the options, and the experts of the config's model beside the gate that peft has just written there.

    Raises:
        CheckpointError: the gate was written as a pickle, or the folder cannot be written.
    """
    with errors_of_writing(folder, "what is there may not be whole", "free some space, and save again"):
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(config, folder, auto_mapping)


def _write_config(config: XLoraConfig, folder: Path, auto_mapping: dict[str, str] | None) -> None:
    replaced: dict[str, Any] = {} if auto_mapping is None else {"auto_mapping": auto_mapping}
    gate_file = folder / SAFETENSORS_WEIGHTS_NAME
    if config.model is not None and config is not config.model.xlora_config:  # of a frozen copy, which is not saved
        gate_file.unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()
        return
    if config.model is not None and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"safe_serialization (False) must be True: weft reads and writes safetensors only. Remove {folder}/"
            "adapter_model.bin"
        )
    if config.model is not None and gate_file.exists():
        assert config.expert_names is not None
        if config.use_trainable_adapters:
            _add_trained_experts(config, gate_file)
        for name in config.expert_names:
            write_expert(config.model, name, folder / EXPERTS_FOLDER / name)
        model: Any = config.model
        model.given_experts = {}
        complete_folder(config, folder, **replaced)
    else:
        _write_options(config, folder, **replaced)


def complete_folder(config: XLoraConfig, folder: Path, **replaced: Any) -> None:
    """Write the manifest of a folder in which gate and experts are, and then the options."""
    assert config.expert_names is not None
    assert config.layer_names is not None
    manifest = manifest_of(folder, config.expert_names, config.layer_names)
    replace_file(folder / MANIFEST_NAME, lambda path: path.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))
    replaced |= {
        "adapters": {name: f"{EXPERTS_FOLDER}/{name}" for name in config.expert_names},
        "format_version": FORMAT_VERSION,
    }
    _write_options(config, folder, **replaced)


def _write_options(config: XLoraConfig, folder: Path, **replaced: Any) -> None:
    text = config_json(config, **replaced)
    replace_file(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def read_config(path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> XLoraConfig:
    """Read and verify a saved folder (see `XLoraConfig.from_pretrained`)."""
    folder = local_folder(path, "the X-LoRA model")
    if subfolder:
        folder = folder / subfolder
        settle(folder)
    adapters = kwargs.pop("adapters", None)
    if is_original(folder):
        config = _config_of(folder / ORIGINAL_CONFIG, original_options(folder, adapters))
        refuse_other_sizes(config, folder / ORIGINAL_CONFIG, folder / ORIGINAL_GATE)
        return config
    file = folder / CONFIG_NAME
    values = read_json(file)
    if values.get("peft_type") != "XLORA":
        raise CheckpointError(f"{file} is of type {kind_shown(values.get('peft_type'))}, expected XLORA")
    problems = unknown_option_problems(values)
    if problems:
        raise ConfigError(f"{file} cannot be read:", problems)
    version = values.get("format_version")
    if version is not None and version not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{file}: format_version ({shown(version)}) must be at most {FORMAT_VERSION}: upgrade weft"
        )
    has_manifest = version is not None or os.path.lexists(folder / MANIFEST_NAME)
    if has_manifest:
        verify(folder, values, with_experts=adapters is None)
    else:
        values.setdefault("layerwise_scalings", False)  # peft's default
    values["adapters"] = adapters if adapters is not None else _saved_adapters(folder, values)
    values |= {name: value for name, value in kwargs.items() if name not in _FETCHING and name in values}
    config = _config_of(file, values).read_from(folder)
    refuse_other_sizes(config, file, folder / SAFETENSORS_WEIGHTS_NAME)
    return config


def _config_of(file: Path, values: dict[str, Any]) -> XLoraConfig:
    """The options that a file holds; their errors name it."""
    try:
        return XLoraConfig(**values)
    except ConfigError as err:
        raise ConfigError(f"{file} cannot be read:", err.problems) from err


def _saved_adapters(folder: Path, values: JsonTable) -> dict[str, str]:
    """The adapters' paths as the folder names them."""
    table = values.table("adapters", None)
    problems = name_problems(table or ())  # before they are used as folders
    if problems:
        raise ConfigError(f"{folder / CONFIG_NAME} cannot be read:", problems)
    return {name: _resolve(folder, name, table.string(name)) for name in table or ()}


def load_gate(model: torch.nn.Module, folder: Path) -> None:
    """Load the gate's tensors into a PeftModel, all of them or none.

    Raises:
        CheckpointError: the file is missing, broken, or of another gate.
    """
    weights = read_gate(folder)
    problems = gate_problems(model, weights)
    if problems:
        file = folder / (ORIGINAL_GATE if is_original(folder) else SAFETENSORS_WEIGHTS_NAME)
        raise CheckpointError(f"{file} does not fit this model:{bullet_list(problems)}")
    with torch.no_grad():
        for key, value in _mixture_tensors(model).items():
            value.copy_(weights[key])


def read_gate(folder: Path) -> dict[str, Tensor]:
    """The tensors of a saved gate (and what is saved beside it), under the names that peft saves them by.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    if is_original(folder):
        return read_original_gate(folder)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not os.path.lexists(file) and os.path.lexists(folder / "adapter_model.bin"):
        raise CheckpointError(
            f"{folder} holds the gate as a pickle (adapter_model.bin), which weft does not open: save it again with "
            "peft's safe_serialization=True"
        )
    return {without_wrappers(key): value for key, value in read_tensors(file).items()}


def saved_base(folder: Path) -> str | None:
    """The base model that a saved mixture names.

    Raises:
        CheckpointError: the folder is no mixture's.
    """
    if is_original(folder):
        return original_base(folder)
    config = read_json(folder / CONFIG_NAME)
    if config.get("peft_type") != "XLORA":
        raise CheckpointError(
            f"model ({folder}) is of type {kind_shown(config.get('peft_type'))}, expected XLORA: a trained mixture"
        )
    return config.string("base_model_name_or_path", None) or None


def gate_problems(model: torch.nn.Module, weights: dict[str, Any]) -> list[str]:
    """What hinders these tensors from being a PeftModel's gate and heads; copies of its experts' beside them do not."""
    own, everything = _mixture_tensors(model), model.state_dict()
    problems = key_problems({key: value for key, value in weights.items() if key in own or key not in everything}, own)
    broken = not_finite({key: value.to(own[key].dtype) for key, value in weights.items() if key in own})
    return problems if broken is None else [*problems, broken]


def _mixture_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a PeftModel's gate and heads, under the names that peft saves them by."""
    gate = {key: value for key, value in model.state_dict().items() if GATE_KEY in key}
    return {**gate, **head_tensors(model)}


def _add_trained_experts(config: XLoraConfig, file: Path) -> None:
    """Put trained experts beside the gate, under their names in the model.

    So every tool that loads the gate through peft (a Trainer that resumes or takes the best checkpoint) gets them too.
    """
    model: Any = config.model
    names = config.expert_names or ()
    experts = {
        f"base_model.{name}": parameter for name, parameter in model.named_parameters() if expert_of_key(name) in names
    }
    tensors = {**read_tensors(file), **_whole(model, experts)}
    replace_file(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def is_expert_key(key: str) -> bool:
    """Whether a parameter of this name belongs to an expert."""
    return expert_of_key(key) is not None


def expert_of_key(key: str) -> str | None:
    """The name of the expert that a parameter of this name belongs to; None where it is no expert's."""
    return next((key.rpartition(part)[2].partition(".")[0] for part in _EXPERT_PARTS if part in key), None)


def given_experts(model: torch.nn.Module, state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The experts' tensors in a state dict of a sharded model; nothing where the model has them itself.

    Raises:
        CheckpointError: the state dict has shards too.
    """
    own = {key: value for key, value in state_dict.items() if is_expert_key(key) or GATE_KEY in key}
    if not any(is_sharded(parameter) for name, parameter in model.named_parameters() if is_expert_key(name)):
        return {}
    if any(map(is_sharded, own.values())):
        raise CheckpointError(
            "the model is sharded over several processes: gather it with accelerator.get_state_dict(model) in all of "
            "them, and in the first call save_pretrained(folder, state_dict=...) with what came out"
        )
    return own


def _whole(model: Any, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """These parameters as tensors of their own; those that FSDP shards are taken from the given state dict."""
    names = {id(parameter): f"base_model.{name}" for name, parameter in model.named_parameters()}
    tensors = {}
    for key, parameter in parameters.items():
        if is_sharded(parameter):
            name = names[id(parameter)]
            if name not in model.given_experts:
                raise CheckpointError(
                    f"expert tensor {name} is sharded over several processes and not in the state_dict: call "
                    "weft.register_with_peft() before save_pretrained, and give it all of the model's state_dict"
                )
            parameter = model.given_experts[name]
        tensors[key] = parameter.detach().clone(memory_format=torch.contiguous_format)
    return tensors


def layer_mismatch(saved: list[str], found: list[str]) -> str:
    """How the LoRA layers that a gate was saved for differ from those in the model."""
    missing = sorted(set(saved) - set(found))
    unexpected = sorted(set(found) - set(saved))
    return (
        f"the gate was saved for {len(saved)} LoRA layers, the experts have {len(found)} in this base model; "
        f"missing: {missing[:5] or 'none'}, unexpected: {unexpected[:5] or 'none'}"
        + ("" if missing or unexpected else " (same layers in another order)")
    )


def write_expert(model: Any, name: str, folder: Path) -> None:
    """Write one expert of an X-LoRA model as an ordinary peft adapter."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _whole(model, dict(adapter_parameters(model.lora_model.model, name)))
    broken = not_finite(tensors)
    if broken:
        raise CheckpointError(f"expert {name!r} cannot be saved, as {broken}: nobody could load it")
    tensors |= model.expert_heads[name]
    replace_file(folder / SAFETENSORS_WEIGHTS_NAME, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    card = model.expert_cards[name]
    if card is not None:
        replace_file(folder / CARD, lambda path: path.write_text(card, encoding="utf-8"))
    expert: LoraConfig = model.lora_model.peft_config[name]
    trainable = expert.inference_mode
    expert.inference_mode = True
    try:
        expert.save_pretrained(str(folder))
    finally:
        expert.inference_mode = trainable


def _resolve(folder: Path, name: str, path: str) -> str:
    """An adapter's saved path: inside the folder where it is relative and there, else as it stands.

    One that is gone may have been inside of a folder that was moved.
    """
    inside = folder / path
    if not os.path.isabs(path):
        return str(inside) if os.path.isdir(inside) else path
    moved = folder / EXPERTS_FOLDER / name
    return str(moved) if not os.path.isdir(path) and os.path.isdir(moved) else path

"""Saves a mixture as a self-contained folder (layout: `checkpoint/folder.py`), and loads its gate into a model."""

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

from weft.checkpoint.adapter_keys import without_wrappers
from weft.checkpoint.base_place import FROM_HERE, lasting_name, path_from
from weft.checkpoint.folder import GATE_KEY, SavedMixture, expert_of_key, is_expert_key, write_options
from weft.checkpoint.licenses import CARD, keep_own_card
from weft.checkpoint.manifest import (
    EXPERTS_FOLDER,
    FORMAT_VERSION,
    MANIFEST_NAME,
    manifest_of,
    refuse_strangers_folder,
)
from weft.config import XLoraConfig, config_json
from weft.distributed import is_sharded
from weft.errors import CheckpointError, bullet_list
from weft.files.failures import errors_of_writing
from weft.files.tensors import not_finite, read_tensors
from weft.files.writing import replace_file, replace_folder, settle
from weft.model.frozen_copies import refuse_frozen_copy
from weft.model.heads import head_tensors
from weft.model.inject import adapter_parameters, key_problems


def save_whole(model: PeftModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """peft's `save_pretrained`, but atomic: the folder has the complete new model or is unchanged.

    A README.md that a person wrote is kept.

    Raises:
        ConfigError: files that are not part of a mixture would be replaced.
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
    kwargs.setdefault("save_embedding_layers", False)  # full weights are saved with the experts
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


def write_beside_gate(model: Any, config: Any, folder: Path, auto_mapping: dict[str, str] | None) -> None:
    """Write the experts and the options of a model beside the gate, which peft has written.

    Args:
        model: an X-LoRA model.
        config: the config that peft saves: the model's, or that of a frozen copy, which is not saved.
        folder: the folder with the gate.
        auto_mapping: peft's value, which is added to the options.

    Raises:
        CheckpointError: the gate was written as a pickle, or the folder cannot be written.
    """
    with errors_of_writing(folder, "what is there may not be whole", "save to another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        _write_beside_gate(model, config, folder, {} if auto_mapping is None else {"auto_mapping": auto_mapping})


def _write_beside_gate(model: Any, config: Any, folder: Path, replaced: dict[str, Any]) -> None:
    gate_file = folder / SAFETENSORS_WEIGHTS_NAME
    if config is not model.xlora_config:
        gate_file.unlink(missing_ok=True)
        with suppress(OSError):  # the folder has other files
            folder.rmdir()
        return
    if (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"safe_serialization (False) must be True: weft reads and writes safetensors only. Remove {folder}/"
            "adapter_model.bin"
        )
    if not gate_file.exists():
        write_options(folder, config_json(config, **replaced))
        return
    assert config.expert_names is not None
    if config.use_trainable_adapters:
        _add_trained_experts(model, config.expert_names, gate_file)
    for name in config.expert_names:
        write_expert(model, name, folder / EXPERTS_FOLDER / name)
    model.given_experts = {}
    complete_folder(config, folder, **replaced)


def complete_folder(config: XLoraConfig, folder: Path, **replaced: Any) -> None:
    """Write the manifest, and then the options, of a folder that has gate and experts."""
    assert config.expert_names is not None
    assert config.layer_names is not None
    manifest = manifest_of(folder, config.expert_names, config.layer_names)
    base = path_from(folder, config.base_model_name_or_path)
    if base is not None:
        manifest[FROM_HERE] = base
    replace_file(folder / MANIFEST_NAME, lambda path: path.write_text(json.dumps(manifest, indent=1), encoding="utf-8"))
    replaced |= {
        "adapters": {name: f"{EXPERTS_FOLDER}/{name}" for name in config.expert_names},
        "format_version": FORMAT_VERSION,
    }
    write_options(folder, config_json(config, **replaced))


def load_gate(model: torch.nn.Module, saved: SavedMixture) -> None:
    """Load the gate's tensors into a PeftModel. If one does not fit, none is loaded.

    Raises:
        CheckpointError: the file is missing, broken, or belongs to another gate.
    """
    weights = saved.gate()
    problems = gate_problems(model, weights)
    if problems:
        raise CheckpointError(f"{saved.gate_file} does not fit this model:{bullet_list(problems)}")
    with torch.no_grad():
        for key, value in _mixture_tensors(model).items():
            value.copy_(weights[key])


def gate_problems(model: torch.nn.Module, weights: dict[str, Any]) -> list[str]:
    """Why these tensors are not a PeftModel's gate and heads; copies of its experts are ignored."""
    own, everything = _mixture_tensors(model), model.state_dict()
    problems = key_problems({key: value for key, value in weights.items() if key in own or key not in everything}, own)
    broken = not_finite({key: value.to(own[key].dtype) for key, value in weights.items() if key in own})
    return problems if broken is None else [*problems, broken]


def _mixture_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a PeftModel's gate and heads, under peft's keys."""
    gate = {key: value for key, value in model.state_dict().items() if GATE_KEY in key}
    return {**gate, **head_tensors(model)}


def _add_trained_experts(model: Any, names: list[str], file: Path) -> None:
    """Add the trained experts to the gate's file, under their names in the model.

    Then every tool that loads the gate through peft (a Trainer that resumes or loads the best checkpoint) loads them.
    """
    experts = {
        f"base_model.{name}": parameter for name, parameter in model.named_parameters() if expert_of_key(name) in names
    }
    tensors = {**read_tensors(file), **_whole(model, experts)}
    replace_file(file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))


def given_experts(model: torch.nn.Module, state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The experts' tensors in the state dict of a sharded model; empty if the model is not sharded.

    Raises:
        CheckpointError: the tensors in the state dict are shards, too.
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
    """Copies of these parameters; sharded ones are taken from the state dict that was given."""
    names: dict[int, str] = {}
    if any(map(is_sharded, parameters.values())):
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
    """How a saved gate's LoRA layers differ from those in the model, for a message."""
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
    trainable, base = expert.inference_mode, expert.base_model_name_or_path
    expert.inference_mode, expert.base_model_name_or_path = True, lasting_name(base)
    try:
        expert.save_pretrained(str(folder))
    finally:
        expert.inference_mode, expert.base_model_name_or_path = trainable, base

"""Adds an expert to a saved mixture, or removes one. The gate's weights for the other experts do not change.

The gate's last linear layer has one row for each LoRA layer l and expert e, which computes the logit z_{l,e}. The rows
are in the order [layer, expert], flattened.

To drop an expert, its rows are removed. The shares are a softmax over the experts, so the ratios of the other shares do
not change, as if the logits of the dropped expert were -inf.

A new expert is initialised with the mean of the others' rows (weights and biases), so its logit is their mean logit:

    z_{l,new} = 1/N Σ_e z_{l,e}        share_new = exp(z_new) / (Σ_e exp(z_e) + exp(z_new)) <= 1/(N+1)

Its share is 1/(N+1) if all logits are equal, and smaller the more the gate prefers one of the others. Without a softmax
(`enable_softmax` and `enable_softmax_topk` both off) the gate's outputs are the weights themselves, and those of the
new expert are initialised with 0. A LoRA layer that only the new expert adapts is initialised with the mean of the
gate's rows over all layers:

    z_{new,e} = 1/L Σ_l z_{l,e}
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.base_model.loading import base_model_of
from weft.checkpoint.adapter_keys import KEY_PREFIX, brought_keys
from weft.checkpoint.folder import GATE_KEY, SavedMixture, is_expert_key, open_mixture
from weft.checkpoint.manifest import EXPERTS_FOLDER, MANIFEST_NAME
from weft.config import XLoraConfig
from weft.errors import CheckpointError, ConfigError
from weft.files.ownership import folder_beside, used_folder_problem
from weft.files.reading import naming_problem, own_files, path_shown
from weft.files.tensors import preview, taken
from weft.files.writing import check_folder, replace_folder, settle
from weft.model.registration import peft_model_of
from weft.model.saving import complete_folder, write_expert
from weft.passes.gate_position import first_following_layer

_TRAINING_STATE = "trainer_state.json"
_NOT_CARRIED = {".bin", ".pt", ".pth", ".part"}  # pickles, and leftovers of killed processes
_WEFTS_OWN = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MANIFEST_NAME}


@torch.no_grad()
def add_expert(
    model: str | os.PathLike[str],
    name: str,
    adapter: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    base: nn.Module | str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Add an expert to a saved mixture, as the last one. The gate's rows for the others do not change, bit for bit.

    The new expert starts with the mean logit of the others, z_{l,new} = 1/N Σ_e z_{l,e} (see `weft.formats.experts`).
    The gate should then be trained further. A `scaling_pass_value` of 1/N becomes 1/(N+1); other options do not change.

    Args:
        model: folder or Hub id of a mixture that weft saved.
        name: name of the new expert.
        adapter: folder or Hub id of a LoRA adapter of the same base model.
        output: folder for the new mixture: a new or empty one, or the model's own, which is then replaced. None takes
            MODEL-with-NAME.
        base: the base model (it is not changed), its folder or its Hub id; None takes the one that the mixture names.
        trust_remote_code: run code that comes with the base model.

    Returns:
        The output folder. Checkpoints of a training are not copied, as they belong to the old mixture.

    Raises:
        ConfigError: the name is taken or not valid, or the output folder has other files.
        AdapterError: the adapter cannot be read, or does not fit the base model.
        CheckpointError: the mixture or its base model cannot be read, or the folder cannot be written. The folder is
            unchanged then.

    Example:
        >>> weft.add_expert("my-mixture", "chem", "adapters/chem")
        >>> model = weft.from_pretrained("my-mixture-with-chem", is_trainable=True)
        >>> model.xlora_config.expert_names  # ["math", "code", "chem"]
    """
    saved, config = _open(model)
    assert config.adapters is not None
    if name in config.adapters:
        raise ConfigError(f"name ({name!r}) must not be one of the mixture's experts: it has {list(config.adapters)}")
    adapters = {**config.adapters, name: os.fspath(adapter)}
    new = _changed(config, adapters)
    target = _target(model, saved.folder, output, f"with-{name}")
    loaded = base_model_of(base, config, trust_remote_code=trust_remote_code)
    tuner: Any = peft_model_of(loaded, new.carry(saved)).base_model
    try:
        new.layer_names = tuner.xlora_config.layer_names
        following = new.layer_names[first_following_layer(tuner.backbone, new) :]
        gate, heads = _take_gate(saved)
        before = _followers(gate, config)
        _map_head(gate, config, lambda rows: _with_expert(rows, before, following, config))

        def write(part: Path) -> None:
            write_expert(tuner, name, part / EXPERTS_FOLDER / name)
            _write(part, saved.folder, new, {**gate, **heads})

        replace_folder(target, write, CONFIG_NAME)
    finally:
        tuner.unload()
    return target


@torch.no_grad()
def drop_expert(model: str | os.PathLike[str], name: str, output: str | os.PathLike[str] | None = None) -> Path:
    """Remove an expert from a saved mixture. The gate's rows for the others do not change, bit for bit.

    share_e becomes share_e / (1 - share_dropped) for each of the others, in each layer and for each token. Layers that
    only the dropped expert adapts are removed from the mixture. The base model is not needed. A `scaling_pass_value` of
    1/N becomes 1/(N-1); other options do not change.

    Args:
        model: folder or Hub id of a mixture that weft saved.
        name: name of the expert.
        output: folder for the new mixture: a new or empty one, or the model's own, which is then replaced. None takes
            MODEL-without-NAME.

    Returns:
        The output folder. Checkpoints of a training are not copied, as they belong to the old mixture.

    Raises:
        ConfigError: there is no such expert, it is the only one, `top_k_lora` would be larger than the number of
            experts, no layer would use the gate, or the output folder has other files.
        CheckpointError: the mixture cannot be read, or the folder cannot be written. The folder is unchanged then.

    Example:
        >>> weft.drop_expert("my-mixture", "code")
        >>> weft.from_pretrained("my-mixture-without-code").xlora_config.expert_names  # ["math"]
    """
    saved, config = _open(model)
    assert config.adapters is not None
    names = list(config.adapters)
    if name not in names:
        raise ConfigError(f"name ({name!r}) must be one of the mixture's experts {names}")
    if len(names) == 1:
        raise ConfigError(f"name ({name!r}) is the mixture's only expert, which cannot be dropped: use the base model")
    if config.top_k_lora is not None and config.top_k_lora >= len(names):
        raise ConfigError(
            f"top_k_lora ({config.top_k_lora}) must be at most the number of experts that are left ({len(names) - 1}): "
            f"lower it first, with model.set_topk_lora({len(names) - 1}) and model.save_pretrained(...)"
        )
    keys = {other: list(taken(_tensor_file(saved, other), saved.tensors)) for other in names}
    brought = {other: set(brought_keys(keys[other], config.heads or ())) for other in names}
    alone = brought.pop(name).difference(*brought.values())
    if alone:
        raise ConfigError(
            f"name ({name!r}) is the only expert that contains the base model's weights {preview(sorted(alone))}, with "
            "which the gate was trained: make a new mixture of the others, with weft.from_adapters, and train its gate"
        )
    target = _target(model, saved.folder, output, f"without-{name}")
    new = _changed(config, {other: path for other, path in config.adapters.items() if other != name})
    adapted = {layer for other in new.adapters or {} for layer in _adapted_layers(keys[other])}
    new.layer_names = [layer for layer in config.layer_names or [] if layer in adapted]
    gate, heads = _take_gate(saved)
    before = _followers(gate, config)
    kept = [number for number, layer in enumerate(before) if layer in adapted]
    if not kept:
        raise ConfigError(
            f"name ({name!r}) is the only expert with layers behind gate_layer ({config.gate_layer}): without it no "
            "layer would follow the gate"
        )
    columns = [number for number, other in enumerate(names) if other != name]
    if config.layerwise_scalings:
        _map_head(gate, config, lambda rows: rows[kept][:, columns])
    else:
        _map_head(gate, config, lambda rows: rows[:, columns])
    replace_folder(target, lambda part: _write(part, saved.folder, new, {**gate, **heads}), CONFIG_NAME)
    return target


def _open(model: str | os.PathLike[str]) -> tuple[SavedMixture, XLoraConfig]:
    saved = open_mixture(model)
    config = XLoraConfig.of_saved(saved)
    if config.layer_names is None or config.format_version is None:
        raise CheckpointError(
            f"{saved.folder} was not saved by weft, so its experts lie elsewhere: save it first, with "
            "weft.from_pretrained(...).save_pretrained(...)"
        )
    return saved, config


def _target(model: str | os.PathLike[str], folder: Path, output: str | os.PathLike[str] | None, what: str) -> Path:
    """The output folder; it is refused if anything other than the old mixture would be replaced."""
    target = Path(output).expanduser() if output is not None else folder_beside(model, what)
    problem = naming_problem(target)
    if problem is not None:
        raise ConfigError(f"output ({path_shown(target)}) cannot be made: {problem}")
    settle(target, leftovers=True)
    problem = None if target.resolve() == folder.resolve() else used_folder_problem(target, "output")
    if problem is not None:
        raise ConfigError(f"{problem}, or the mixture's own ({model}) to change it in place")
    check_folder(target, "output")
    if target.resolve() == folder.resolve() and (folder / _TRAINING_STATE).exists():
        raise ConfigError(
            f"output ({target}) is a checkpoint of a training, which could not be resumed then: give another folder"
        )
    return target


def _changed(config: XLoraConfig, adapters: dict[str, str]) -> XLoraConfig:
    """The options for other experts, without their layers, which are not known yet."""
    value = config.scaling_pass_value
    if value == 1 / config.num_experts:  # the mean of the experts
        value = 1 / len(adapters)
    return dataclasses.replace(
        config, adapters=adapters, expert_names=list(adapters), layer_names=None, scaling_pass_value=value
    )


def _take_gate(saved: SavedMixture) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors of the gate, tensors of the heads), without copies of trained experts."""
    tensors = saved.gate()
    gate = {key: value for key, value in tensors.items() if GATE_KEY in key}
    return gate, {key: value for key, value in tensors.items() if key not in gate and not is_expert_key(key)}


def _followers(gate: dict[str, Tensor], config: XLoraConfig) -> list[str]:
    """The LoRA layers that use the gate's scalings: all except those before `gate_layer`."""
    layers = config.layer_names or []
    if config.layerwise_scalings:
        return layers[len(layers) - len(gate[_head_keys(gate)[0]]) // config.num_experts :]
    if config.gate_layer is None:
        return layers
    numbers = {layer: re.search(r"\.(\d+)\.", layer) for layer in layers}
    return [layer for layer, number in numbers.items() if number and int(number[1]) >= config.gate_layer]


def _head_keys(gate: dict[str, Tensor]) -> list[str]:
    """The keys of the gate's last linear layer, which has the largest index."""
    number = {key: int(key.rsplit(".", 2)[1]) for key in gate if f"{GATE_KEY}layers." in key}
    return [key for key in number if number[key] == max(number.values())]


def _map_head(gate: dict[str, Tensor], config: XLoraConfig, change: Callable[[Tensor], Tensor]) -> None:
    """Change the weight and bias of the gate's last linear layer; `change` gets them as [layer, expert, ...]."""
    for key in _head_keys(gate):
        rows = gate[key].unflatten(0, (-1, config.num_experts))
        gate[key] = change(rows).flatten(0, 1).contiguous()


def _with_expert(rows: Tensor, before: list[str], after: list[str], config: XLoraConfig) -> Tensor:
    """The rows [layer, expert, ...] for the layers `after`, with one more expert."""
    if config.layerwise_scalings:
        place = {layer: number for number, layer in enumerate(before)}
        mean = rows.mean(0)
        rows = torch.stack([rows[place[layer]] if layer in place else mean for layer in after])
    new = rows.mean(1, keepdim=True)
    if not config.enable_softmax and not config.enable_softmax_topk:
        new = torch.zeros_like(new)
    return torch.cat([rows, new], dim=1)


def _adapted_layers(keys: list[str]) -> set[str]:
    return {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for key in keys}


def _tensor_file(saved: SavedMixture, name: str) -> Path:
    return saved.folder / EXPERTS_FOLDER / name / SAFETENSORS_WEIGHTS_NAME


def _copy_expert(folder: Path, new: Path) -> None:
    """Copy an expert and the files beside it. Links to other folders are skipped, except the verified files."""
    new.mkdir(parents=True)
    for file in {*own_files(folder), folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME}:
        shutil.copy(file, new / file.name)


def _write(part: Path, folder: Path, config: XLoraConfig, tensors: dict[str, Tensor]) -> None:
    """Write the new mixture, and copy files beside the old one (tokenizer, model card), but no training state."""
    for file in own_files(folder):
        if file.name not in {*_WEFTS_OWN, _TRAINING_STATE} and file.suffix not in _NOT_CARRIED:
            shutil.copy(file, part / file.name)
    for name in config.expert_names or []:
        new = part / EXPERTS_FOLDER / name
        if not new.exists():
            _copy_expert(folder / EXPERTS_FOLDER / name, new)
    save_file(tensors, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    complete_folder(config, part)

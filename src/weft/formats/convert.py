"""A saved mixture in another library's layout, with the same logits there, or an error that names what hinders.

Nothing is computed: the gate's numbers and the experts' files are written under other names, so that the base model's
weights are not needed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType, TaskType
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.checkpoint.adapter_keys import brought_keys
from weft.checkpoint.adapters import Adapter, local_folder
from weft.checkpoint.licences import CARD, licensed_card
from weft.checkpoint.manifest import EXPERTS_FOLDER, MANIFEST_NAME
from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG, ORIGINAL_GATE, SHARED_OPTIONS, TRAINED_ADAPTERS
from weft.config import XLoraConfig
from weft.errors import ConfigError
from weft.files.ownership import refuse_used_folder
from weft.files.reading import own_files, read_json
from weft.files.tensors import preview
from weft.files.writing import replace_folder
from weft.formats.mixture import ORDERING, MixtureFiles, opened
from weft.model.saving import complete_folder

Base = nn.Module | str | os.PathLike[str] | None
_LAYOUT_FILES = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, MANIFEST_NAME, ORIGINAL_CONFIG, ORIGINAL_GATE, ORDERING}
_COMPANIONS = {".json", ".jinja", ".model", ".txt"}  # tokenizers, and what else is no pickle
# Options of an expert that mistral.rs does not read.
_UNREAD = ("use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "layers_to_transform", "exclude_modules")
# Options of weft that only matter in training, or not to the logits.
TRAINING_OPTIONS = (
    "balance_loss_weight",
    "entropy_loss_weight",
    "expert_label_loss_weight",
    "scalings_log_size",
)


def convert_mixture(
    source: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str],
    *,
    base: Base = None,
    adapters: dict[str, str] | None = None,
    rename: dict[str, str] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write a saved mixture in another layout; its logits there are the same.

    Args:
        source: folder or Hub id, in weft's layout, peft's, the original xlora library's or mistral.rs's.
        to: "weft", "peft", "xlora" or "mistralrs".
        output: a new or empty folder.
        base: the base model, or its name or path, of which only the config is read; for "mistralrs" the name that the
            engine will load it by. None takes the one that the source names.
        adapters: name -> where the experts are, if not where the source says.
        rename: old name -> new name of experts.
        trust_remote_code: run the code that a base model brings along, where its config is read.

    Returns:
        The folder.

    Raises:
        ConfigError: the target cannot hold the mixture (all reasons at once), or the output is not empty.
        CheckpointError, AdapterError: the source cannot be read.

    Example:
        >>> weft.convert_mixture("lamm-mit/x-lora-gemma-7b", "weft", "x-lora-gemma")
        >>> weft.convert_mixture("my-mixture", "peft", "for-peft", rename={"math": "0", "code": "1"})
    """
    if to not in _FORMATS:
        raise ConfigError(f"to ({to!r}) must be one of {', '.join(_FORMATS)}")
    problems_of, write = _FORMATS[to]
    target = Path(output).expanduser()
    refuse_used_folder(target)
    with opened(source, adapters, rename, base_is_given=base is not None) as files:
        if base is not None and not isinstance(base, nn.Module):
            files.config.base_model_name_or_path = os.fspath(base)
        problems = problems_of(files)
        if problems:
            raise ConfigError(f"{source} cannot be written in the layout of {to}:", problems)
        needed = to in ("weft", "mistralrs")
        layers = files.layers_in_order(base, trust_remote_code=trust_remote_code) if needed else []
        last = CONFIG_NAME if to in ("weft", "peft") else ORIGINAL_CONFIG
        replace_folder(target, lambda part: write(files, layers, part, target), last)
    return target


def left_out(source: str | os.PathLike[str], to: str) -> list[str]:
    """The options of a saved mixture that another layout has no place for, and that do not change the logits."""
    file = local_folder(source, "the mixture") / CONFIG_NAME
    if to == "weft" or not os.path.lexists(file):
        return []
    saved, defaults = read_json(file), {field.name: field.default for field in dataclasses.fields(XLoraConfig)}
    return [name for name in TRAINING_OPTIONS if saved.get(name, defaults[name]) != defaults[name]]


# ---------------------------------------------------------------------- what a layout cannot hold


def _no_problems(files: MixtureFiles) -> list[str]:
    return []


def _common_problems(files: MixtureFiles, library: str) -> list[str]:
    config, problems = files.config, []
    for name in ("gate_layer", "scaling_pass_layers", "heads"):
        if getattr(config, name) is not None:
            problems.append(f"{name} ({getattr(config, name)!r}) is unknown to {library}: train with it left out")
    dora = [adapter.name for adapter in files.adapters if adapter.config.use_dora]
    if dora:
        problems.append(f"experts {dora} have use_dora, which {library} cannot mix: train them without")
    brought = {adapter.name: keys for adapter in files.adapters if (keys := brought_keys(adapter.weights))}
    if brought:
        problems.append(
            f"experts {list(brought)} bring weights of the base model along ({preview(next(iter(brought.values())))}), "
            f"for which {library} has no place: put these into a base model of their own, and train on that"
        )
    if config.task_type == TaskType.SEQ_2_SEQ_LM:
        problems.append(f"task_type ({config.task_type}): {library} cannot mix experts of an encoder-decoder")
    convolutions = _layers_where(files, lambda key, value: value.dim() == 4)
    if convolutions:
        problems.append(f"layers {convolutions[:5]} are convolutions, whose experts {library} cannot mix")
    return problems


def _peft_problems(files: MixtureFiles) -> list[str]:
    problems = _common_problems(files, "peft's X-LoRA")
    names = list(files.config.adapters or {})
    numbers = [str(number) for number in range(len(names))]
    if names != numbers:
        pairs = " ".join(f"{name}={number}" for name, number in zip(names, numbers, strict=True))
        problems.append(
            f"experts {names} must be named {numbers}, in this order: peft ends in a KeyError with other names. "
            f"Rename them: --rename {pairs}"
        )
    elsewhere = sorted(layer for layer in files.layers if not layer.startswith("model.") or "model.model." in layer)
    if elsewhere:
        problems.append(
            f"layers {elsewhere[:5]} are not below 'model.': peft looks for every expert's tensors there and nowhere "
            "else"
        )
    return problems


def _xlora_problems(files: MixtureFiles, library: str = "the original xlora") -> list[str]:
    problems = _common_problems(files, library)
    embeddings = _layers_where(files, lambda key, value: ".lora_embedding_" in key)
    if embeddings:
        problems.append(f"layers {embeddings[:5]} are embeddings, whose experts {library} cannot mix")
    if files.config.enable_softmax_topk:
        problems.append(
            f"enable_softmax_topk (True): {library} has no softmax over each token's kept experts; with it off, and "
            "enable_softmax on, the gate must be trained anew"
        )
    return problems


def _mistralrs_problems(files: MixtureFiles) -> list[str]:
    problems = _xlora_problems(files, "mistral.rs")
    config, first = files.config, files.adapters[0]
    names = list(config.adapters or {})
    for option in ("r", "lora_alpha", "target_modules"):
        values = {adapter.name: getattr(adapter.config, option) for adapter in files.adapters}
        if any(value != values[first.name] for value in values.values()):
            shown = {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
            problems.append(f"{option} ({shown}) must be the same for all experts")
    for adapter in files.adapters:
        set_ = [name for name in _UNREAD if getattr(adapter.config, name, None)]
        if set_:
            problems.append(f"expert {adapter.name!r} has {', '.join(set_)}, which mistral.rs does not read")
    targets = first.config.target_modules
    if not isinstance(targets, (set, list)) or any("." in target for target in targets):
        problems.append(f"target_modules ({targets!r}) must be names of single modules, such as 'q_proj'")
    outside = sorted(layer for layer in files.layers if not layer.startswith("model.layers."))
    if outside:
        problems.append(
            f"layers {outside[:5]} are not among the decoder layers ('model.layers.'), which alone it adapts"
        )
    if config.xlora_depth > 1 and config.xlora_size != config.hidden_size:
        problems.append(
            f"xlora_size ({config.xlora_size}) must be hidden_size ({config.hidden_size}) where xlora_depth "
            f"({config.xlora_depth}) is above 1: mistral.rs takes the one for the other"
        )
    within = [(one, other) for one in names for other in names if one != other and one in other]
    if within:
        problems.append(
            f"experts {within[0][0]!r} and {within[0][1]!r}: mistral.rs finds an expert's files by its name, and "
            f"the one is in the other. Rename them: --rename {within[0][0]}=... {within[0][1]}=..."
        )
    if config.base_model_name_or_path is None:
        problems.append("base is missing: give --base, the name or folder by which the engine will load the base model")
    return problems


def _layers_where(files: MixtureFiles, condition: Callable[[str, Tensor], bool]) -> list[str]:
    found = {
        key.removeprefix("base_model.model.").rpartition(".lora_")[0]
        for adapter in files.adapters
        for key, value in adapter.weights.items()
        if ".lora_" in key and condition(key, value)
    }
    return sorted(found)


# ---------------------------------------------------------------------- writing


def _write_weft(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    for adapter in files.adapters:
        _copy_expert(adapter, part / EXPERTS_FOLDER / adapter.name)
    _copy_companions(files.folder, part)
    _save(files.tensors, part / SAFETENSORS_WEIGHTS_NAME)
    config = dataclasses.replace(files.config, layer_names=layers)
    if config.task_type is None and all(a.config.task_type == TaskType.CAUSAL_LM for a in files.adapters):
        config.task_type = TaskType.CAUSAL_LM
    config.inference_mode = True
    complete_folder(config, part)


def _write_peft(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    for adapter in files.adapters:
        _copy_expert(adapter, part / EXPERTS_FOLDER / adapter.name)
    _copy_companions(files.folder, part)
    _save(files.tensors, part / SAFETENSORS_WEIGHTS_NAME)
    kept = (*SHARED_OPTIONS, "base_model_name_or_path", "task_type", "auto_mapping", "revision")
    values = {name: getattr(files.config, name) for name in kept}
    # peft looks for relative paths in the directory in which it is started.
    paths = {a.name: str(target.resolve() / EXPERTS_FOLDER / a.name) for a in files.adapters}
    values |= {"adapters": paths, "peft_type": PeftType.XLORA.value, "inference_mode": True}
    _write_json(part / CONFIG_NAME, values)


def _write_xlora(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    trained = files.config.use_trainable_adapters
    for adapter in files.adapters:
        _copy_expert(adapter, part / (TRAINED_ADAPTERS if trained else "") / adapter.name)
    _save(_original_gate(files, stride=3), part / ORIGINAL_GATE)
    _write_json(part / ORIGINAL_CONFIG, _original_config(files))


def _write_mistralrs(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    names = [adapter.name for adapter in files.adapters]
    for adapter in files.adapters:
        # Side by side: the engine does not look into the folders of a folder.
        shutil.copy(adapter.folder / CONFIG_NAME, part / f"{adapter.name}_config.json")
        _save({**adapter.weights, **adapter.heads}, part / f"{adapter.name}_model.safetensors")
    _save(_original_gate(files, stride=1), part / ORIGINAL_GATE)
    # It leaves dropout on.
    config = _original_config(files) | {"adapters": {name: name for name in names}, "xlora_dropout_p": 0.0}
    _write_json(part / ORIGINAL_CONFIG, config)
    ordering = {
        "order": names,
        "layers": {layer: number for number, layer in enumerate(layers)},
        "base_model_id": files.config.base_model_name_or_path,
    }
    _write_json(part / ORDERING, ordering)


def _original_config(files: MixtureFiles) -> dict[str, Any]:
    config = files.config
    own = {
        "adapters": list(config.adapters or {}),
        "base_model_id": config.base_model_name_or_path or "",
        "enable_relu_and_dropout": True,
        "use_bias": True,
    }
    return {name: getattr(config, name) for name in SHARED_OPTIONS} | own


def _original_gate(files: MixtureFiles, stride: int) -> dict[str, Tensor]:
    """The gate under the original library's names; `stride` is how far apart it counts two linear layers."""
    *inner, last = files.linear_layers()
    named = {f"inner.{number * stride}": layer for number, layer in enumerate(inner)} | {"last": last}
    return {
        f"{name}.{part}": t for name, layer in named.items() for part, t in zip(("weight", "bias"), layer, strict=True)
    }


def _copy_expert(adapter: Adapter, folder: Path) -> None:
    folder.mkdir(parents=True)
    shutil.copy(adapter.folder / CONFIG_NAME, folder / CONFIG_NAME)
    _save({**adapter.weights, **adapter.heads}, folder / SAFETENSORS_WEIGHTS_NAME)
    if licensed_card(adapter.folder) is not None and adapter.folder / CARD in own_files(adapter.folder):
        shutil.copy(adapter.folder / CARD, folder / CARD)


def _copy_companions(source: Path, part: Path) -> None:
    for file in own_files(source):
        if file.suffix in _COMPANIONS and file.name not in {*_LAYOUT_FILES, "trainer_state.json"}:
            shutil.copy(file, part / file.name)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, file, metadata={"format": "pt"})


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2), encoding="utf-8")


_Problems = Callable[[MixtureFiles], list[str]]
_Writer = Callable[[MixtureFiles, list[str], Path, Path], None]
_FORMATS: dict[str, tuple[_Problems, _Writer]] = {
    "weft": (_no_problems, _write_weft),
    "peft": (_peft_problems, _write_peft),
    "xlora": (_xlora_problems, _write_xlora),
    "mistralrs": (_mistralrs_problems, _write_mistralrs),
}

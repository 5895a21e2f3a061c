"""A saved mixture as it lies in a folder of any layout, read without its base model's weights.

Layouts: weft's, peft's X-LoRA, the original xlora library's, and mistral.rs's (that of the original, flat, with a file
that numbers the LoRA layers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig

from weft.adapter_keys import KEY_PREFIX
from weft.adapters import Adapter, local_folder, read_adapters, read_json, read_tensors
from weft.checkpoint import GATE_KEY, read_config, read_gate
from weft.config import XLoraConfig
from weft.errors import CheckpointError
from weft.integration import base_error, model_class
from weft.original import ORIGINAL_CONFIG, ORIGINAL_GATE, is_original
from weft.whole import temporary_folder

ORDERING = "ordering.json"


@dataclass(frozen=True)
class MixtureFiles:
    """What a folder holds.

    Args:
        folder: where it lies.
        config: its options; the adapters' paths are those of their folders.
        tensors: the gate's and the heads' tensors, under peft's names.
        adapters: the experts in the order of the gate's outputs.
        layers: the LoRA layers by name, in no order.
        layer_names: the same in the order of the gate's outputs; None where the folder does not tell it.
    """

    folder: Path
    config: XLoraConfig
    tensors: dict[str, Tensor]
    adapters: list[Adapter]
    layers: set[str]
    layer_names: list[str] | None

    def linear_layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of the gate's linear layers, the first one first."""
        gate = {key.partition(GATE_KEY)[2]: value for key, value in self.tensors.items() if GATE_KEY in key}
        numbers = sorted({int(key.split(".")[1]) for key in gate})
        return [(gate[f"layers.{number}.weight"], gate[f"layers.{number}.bias"]) for number in numbers]

    def layers_in_order(self, base: nn.Module | str | os.PathLike[str] | None, *, trust_remote_code: bool) -> list[str]:
        """The LoRA layers in the order of the gate's outputs.

        Args:
            base: the base model, or its name or path, where the folder does not tell the order; only its config is
                read. None takes the one that the folder names.
            trust_remote_code: run code that comes with it.

        Raises:
            CheckpointError: there is no such base model, or it has other layers.
        """
        if self.layer_names is not None:
            return self.layer_names
        modules = _empty_base(base, self.config, trust_remote_code=trust_remote_code)
        names = [name for name, _ in modules.named_modules() if name in self.layers]
        missing = sorted(self.layers - set(names))
        if missing:
            raise CheckpointError(
                f"base ({type(modules).__name__}) has no layers {missing[:5]}, which the adapters in {self.folder} "
                "adapt: expected the model that they were made for, by its names of today. Where transformers has "
                "renamed layers, weft.from_pretrained(...).save_pretrained(...) writes the new names"
            )
        return names


@contextlib.contextmanager
def opened(
    source: str | os.PathLike[str],
    adapters: dict[str, str] | None = None,
    rename: dict[str, str] | None = None,
    *,
    base_is_given: bool = False,
) -> Iterator[MixtureFiles]:
    """Read a saved mixture of any layout.

    Args:
        source: folder or Hub id.
        adapters: where the experts are, if not where the folder says.
        rename: new names of experts, {old: new}.
        base_is_given: the base model is known, though the folder may not name it.

    Raises:
        WeftError: a file is missing or broken, or they do not belong together.
    """
    folder = local_folder(os.fspath(source), "the mixture")
    with contextlib.ExitStack() as stack:
        layer_names = None
        if is_flat(folder):
            flat, layer_names = folder, _layers_in_order(folder)
            folder = stack.enter_context(temporary_folder(lambda part: _unfold(flat, part)))
        config = read_config(folder, adapters=adapters)
        names = _renamed(config, rename or {})
        config = dataclasses.replace(
            config,
            adapters={names[name]: path for name, path in (config.adapters or {}).items()},
            expert_names=list(names.values()),
            layer_names=config.layer_names or layer_names,
        )
        heads = config.heads or ()
        experts = read_adapters(
            config.adapters or {},
            allow_dora=config.allow_dora,
            heads=heads,
            # A mixture that weft saved has been on one.
            base_is_known=base_is_given or (config.layer_names or config.base_model_name_or_path) is not None,
        )
        tensors = {key: value for key, value in read_gate(folder).items() if ".lora_" not in key}
        layers = {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for e in experts for key in e.weights}
        files = MixtureFiles(folder, config, tensors, experts, layers - {""}, config.layer_names)
        _check_gate(files)
        yield files


def is_flat(folder: Path) -> bool:
    """Whether a folder is in mistral.rs's layout, with NAME_config.json and NAME_model.safetensors side by side."""
    if not is_original(folder) or not (folder / ORDERING).is_file():
        return False
    return all((folder / f"{name}_config.json").is_file() for name in read_json(folder / ORDERING).get("order") or [0])


def _layers_in_order(flat: Path) -> list[str]:
    layers: dict[str, int] = read_json(flat / ORDERING).get("layers") or {}
    return sorted(layers, key=lambda layer: layers[layer])


def _unfold(flat: Path, folder: Path) -> None:
    """Write a flat folder anew in the original library's layout."""
    ordering = read_json(flat / ORDERING)
    config = read_json(flat / ORIGINAL_CONFIG) | {"adapters": ordering["order"]}
    (folder / ORIGINAL_CONFIG).write_text(json.dumps(config), encoding="utf-8")
    # Its engine counts the gate's linear layers alone, whatever is between them.
    stride = 3 if config.get("enable_relu_and_dropout") else 1
    tensors = {}
    for key, value in read_tensors(flat / ORIGINAL_GATE).items():
        name, _, rest = key.removeprefix("inner.").partition(".")
        tensors[f"inner.{int(name) * stride}.{rest}" if key.startswith("inner.") else key] = value
    save_file(tensors, folder / ORIGINAL_GATE)
    for name in ordering["order"]:
        (folder / name).mkdir()
        shutil.copy(flat / f"{name}_config.json", folder / name / CONFIG_NAME)
        shutil.copy(flat / f"{name}_model.safetensors", folder / name / SAFETENSORS_WEIGHTS_NAME)


def _renamed(config: XLoraConfig, rename: dict[str, str]) -> dict[str, str]:
    """{present name: new name} of all experts."""
    names = list(config.adapters or {})
    strangers = sorted(set(rename) - set(names))
    if strangers:
        raise CheckpointError(f"rename has {strangers}, which are no experts of this mixture: it has {names}")
    new = {name: rename.get(name, name) for name in names}
    if len(set(new.values())) < len(names):
        raise CheckpointError(f"rename ({rename}) gives two experts one name: they would be {list(new.values())}")
    return new


def _check_gate(files: MixtureFiles) -> None:
    """Raise where the gate has not as many outputs as there are experts and layers; `gate_layer` leaves layers out."""
    config, linear = files.config, files.linear_layers()
    if not linear:
        raise CheckpointError(f"{files.folder} holds no gate")
    expected = config.num_experts * (len(files.layers) if config.layerwise_scalings else 1)
    found = len(linear[-1][0])
    if config.gate_layer is None and found != expected:
        raise CheckpointError(
            f"the gate in {files.folder} has {found} outputs, expected {expected}: {config.num_experts} experts times "
            f"{expected // config.num_experts} LoRA layers. It was trained with other adapters"
        )
    if len(linear) != config.xlora_depth:
        raise CheckpointError(
            f"the gate in {files.folder} has {len(linear)} linear layers, expected xlora_depth ({config.xlora_depth})"
        )


def _empty_base(
    base: nn.Module | str | os.PathLike[str] | None, config: XLoraConfig, *, trust_remote_code: bool
) -> nn.Module:
    """The base model without its weights."""
    if isinstance(base, nn.Module):
        return base
    name: Any = base or config.base_model_name_or_path
    if name is None:
        raise CheckpointError("base (None) must be given: the mixture does not name its base model")
    name, trust = os.fspath(name), {"trust_remote_code": trust_remote_code}
    try:
        options, kind = AutoConfig.from_pretrained(name, **trust), model_class(name, config, **trust)
        with torch.device("meta"):
            return kind.from_config(options, **trust) if hasattr(kind, "from_config") else kind(options)
    except (OSError, ValueError) as err:
        raise base_error(name, err) from err

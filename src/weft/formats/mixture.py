"""Reads a saved mixture of any layout, without its base model's weights.

The layouts are those of weft, peft's X-LoRA, the original xlora library, and mistral.rs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from weft.base_model.loading import base_errors, model_class
from weft.checkpoint.adapter_keys import KEY_PREFIX
from weft.checkpoint.adapters import Adapter, local_folder, read_adapters
from weft.checkpoint.folder import GATE_KEY, open_mixture
from weft.checkpoint.mistralrs_layout import ORDERING, is_flat, unfolded
from weft.config import XLoraConfig
from weft.errors import CheckpointError

MIXTURE_NAME = "default"  # peft's name for an adapter without a name
_LINEAR = re.compile(r"layers\.(\d{1,9})\.(?:weight|bias)")


@dataclass(frozen=True)
class MixtureFiles:
    """The content of a mixture's folder.

    Args:
        folder: the folder.
        config: the options; `adapters` has the paths of the experts' folders.
        tensors: the tensors of gate and heads, under peft's keys.
        adapters: the experts in the order of the gate's outputs.
        layers: the names of the LoRA layers.
        layer_names: the same in the order of the gate's outputs; None if the folder does not have the order.
    """

    folder: Path
    config: XLoraConfig
    tensors: dict[str, Tensor]
    adapters: list[Adapter]
    layers: set[str]
    layer_names: list[str] | None

    def linear_layers(self) -> list[tuple[Tensor, Tensor]]:
        """(weight, bias) of each linear layer of the gate, in order.

        Raises:
            CheckpointError: the gate has other tensors.
        """
        gate = {key.partition(GATE_KEY)[2]: value for key, value in self.tensors.items() if GATE_KEY in key}
        if self.config.scaling_pass_rank is not None:
            gate = {key: value for key, value in gate.items() if not key.startswith("scaling_pass_lora.")}
        numbers = sorted({int(found[1]) for key in gate if (found := _LINEAR.fullmatch(key))})
        expected = {f"layers.{number}.{part}" for number in numbers for part in ("weight", "bias")}
        if gate.keys() != expected:
            raise CheckpointError(
                f"the gate in {self.folder} has the tensors {', '.join(sorted(gate))}, expected layers.N.weight and "
                "layers.N.bias of each linear layer"
            )
        return [(gate[f"layers.{number}.weight"], gate[f"layers.{number}.bias"]) for number in numbers]

    def layers_in_order(self, base: nn.Module | str | os.PathLike[str] | None, *, trust_remote_code: bool) -> list[str]:
        """The LoRA layers in the order of the gate's outputs.

        Args:
            base: the base model, its folder or its Hub id, used if the folder does not have the order; only its config
                is read. None takes the one that the folder names.
            trust_remote_code: run code that comes with the base model.

        Raises:
            CheckpointError: there is no such base model, or it does not have these layers.
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
        adapters: name -> path of the experts, if they are not where the folder says.
        rename: old name -> new name of experts.
        base_is_given: the base model is known even if the folder does not name it.

    Raises:
        WeftError: a file is missing or broken, or the files do not fit together.
    """
    folder = local_folder(source, "the mixture")
    with contextlib.ExitStack() as stack:
        layer_names = None
        if is_flat(folder):
            folder, layer_names = stack.enter_context(unfolded(folder))
        saved = open_mixture(folder, adapters=adapters)
        config = XLoraConfig.of_saved(saved)
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
            # The experts of a mixture that weft saved have been on one base model.
            base_is_known=base_is_given or (config.layer_names or config.base_model_name_or_path) is not None,
            opened=saved.tensors,
        )
        tensors = {key: value for key, value in saved.gate().items() if ".lora_" not in key}
        layers = {key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0] for e in experts for key in e.weights} - {""}
        if layer_names is not None and set(layer_names) != layers:
            idle, unknown = sorted(set(layer_names) - layers), sorted(layers - set(layer_names))
            raise CheckpointError(
                f"{source}: {ORDERING} names other layers than the experts adapt: {idle[:5] or 'none'} are adapted by "
                f"none, and {unknown[:5] or 'none'} are not named"
            )
        files = MixtureFiles(folder, config, tensors, experts, layers, config.layer_names)
        _check_gate(files)
        yield files


def _renamed(config: XLoraConfig, rename: dict[str, str]) -> dict[str, str]:
    """present name -> new name, for all experts."""
    names = list(config.adapters or {})
    strangers = sorted(set(rename) - set(names))
    if strangers:
        raise CheckpointError(f"rename has {strangers}, which are no experts of this mixture: it has {names}")
    new = {name: rename.get(name, name) for name in names}
    if MIXTURE_NAME in rename.values():
        raise CheckpointError(f"rename ({rename}) has the name {MIXTURE_NAME!r}, which is the mixture's own in peft")
    if len(set(new.values())) < len(names):
        raise CheckpointError(f"rename ({rename}) gives two experts one name: they would be {list(new.values())}")
    return new


def _check_gate(files: MixtureFiles) -> None:
    """Raise if the gate's outputs do not fit the experts and layers. With `gate_layer`, not all layers have outputs."""
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
    """The base model on the meta device, without weights."""
    if isinstance(base, nn.Module):
        return base
    name: Any = base or config.base_model_name_or_path
    if name is None:
        raise CheckpointError("base (None) must be given: the mixture does not name its base model")
    name, trust = os.fspath(name), {"trust_remote_code": trust_remote_code}
    with base_errors(name):
        options, kind = AutoConfig.from_pretrained(name, **trust), model_class(name, config, **trust)
        with torch.device("meta"):
            return kind.from_config(options, **trust) if hasattr(kind, "from_config") else kind(options)

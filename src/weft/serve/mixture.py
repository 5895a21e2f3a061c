"""A saved mixture for a serving engine: gate, experts and options as plain tensors.

Nothing from peft or from weft's model is imported, as an engine has its own layers. It is checked here, before an
engine starts, that the mixture can be served.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint.manifest import EXPERTS_FOLDER, verify
from weft.errors import CheckpointError, ConfigError
from weft.files.reading import read_json
from weft.files.tensors import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, Opened

_GATE_KEY = "internal_xlora_classifier.layers."
_LORA_KEY = re.compile(r".*internal_xlora_classifier\.scaling_pass_lora\.(.+)\.(down|up)")
_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.(weight|bias)")


@dataclass(frozen=True)
class Factors:
    """The factors of one expert in one layer, which add scaling * (x A^T B^T + bias).

    Attributes:
        down: A, [rank, in].
        up: B, [out, rank].
        scaling: peft's scaling, from alpha and rank.
        bias: `lora_bias`, [out], or None.
    """

    down: Tensor
    up: Tensor
    scaling: float
    bias: Tensor | None = None


@dataclass(frozen=True)
class ServedMixture:
    """A mixture that was read and checked.

    Attributes:
        folder: its folder.
        options: the content of its adapter_config.json.
        experts: names of the experts, in the order of the gate's outputs.
        layers: names of the LoRA layers, in the order of the gate's outputs.
        gate: (weight, bias) of each linear layer of the gate, float32.
        factors: layer -> the factors of each expert; None for an expert that does not adapt the layer.
        scaling_lora: layer -> the factors of the gate's own LoRA in the scaling pass.
    """

    folder: Path
    options: dict[str, Any]
    experts: tuple[str, ...]
    layers: tuple[str, ...]
    gate: tuple[tuple[Tensor, Tensor], ...]
    factors: dict[str, tuple[Factors | None, ...]]
    scaling_lora: dict[str, Factors]

    @property
    def scheme(self) -> str:
        """The passes of the mixture, as text."""
        return scheme_of(self.options)

    def following(self) -> range:
        """The numbers of the layers that use the gate's scalings: all except those before `gate_layer`.

        Raises:
            CheckpointError: there is no such layer.
        """
        gate_layer = self.options.get("gate_layer")
        if gate_layer is None:
            return range(len(self.layers))
        numbers = [decoder_layer(name) for name in self.layers]
        first = next(
            (place for place, number in enumerate(numbers) if number is not None and number >= gate_layer), None
        )
        if first is None:
            raise CheckpointError(f"{self.folder}: no LoRA layer follows gate_layer ({gate_layer})")
        return range(first, len(self.layers))


def scheme_of(options: Mapping[str, Any]) -> str:
    """The passes of a mixture with these options, as text."""
    if options.get("gate_layer") is not None:
        return f"one pass, the gate at decoder layer {options['gate_layer']}"
    if options.get("scaling_pass_layers") is not None:
        return f"a scaling pass of {options['scaling_pass_layers']} decoder layers, then the adapted pass"
    return "a scaling pass, then the adapted pass"


def decoder_layer(name: str) -> int | None:
    """The number of the decoder layer of a module; None if the module is in no decoder layer."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def read_mixture(folder: str | os.PathLike[str]) -> ServedMixture:
    """Read and verify a mixture that weft saved.

    Raises:
        CheckpointError: the folder is not a mixture of weft, is incomplete, or was changed after it was saved.
        ConfigError: the mixture cannot be served.
    """
    path = Path(folder).expanduser()
    options = read_json(path / CONFIG_NAME)
    if options.get("peft_type") != "XLORA" or not options.get("layer_names"):
        raise CheckpointError(
            f"model ({path}) is no mixture that weft saved: write it anew, with  weft convert {path} --to weft "
            "--output FOLDER"
        )
    opened: Opened = {}
    verify(path, options, keep=opened.__setitem__)
    experts, layers = tuple(options["expert_names"]), tuple(options["layer_names"])
    adapters = {name: read_json(path / EXPERTS_FOLDER / name / CONFIG_NAME) for name in experts}
    problems = _problems(options, adapters)
    if problems:
        raise ConfigError(f"model ({path}) cannot be served:", problems)
    tensors = {name: opened[path / EXPERTS_FOLDER / name / SAFETENSORS_WEIGHTS_NAME] for name in experts}
    found = {name: _factors(path, name, tensors[name], adapters[name]) for name in experts}
    factors = {layer: tuple(found[name].get(layer) for name in experts) for layer in layers}
    left = sorted({layer for of in found.values() for layer in of} - set(layers))
    if left:
        raise CheckpointError(f"{path}: experts adapt {left[:5]}, which the gate was not saved for")
    saved = opened[path / SAFETENSORS_WEIGHTS_NAME]
    return ServedMixture(path, options, experts, layers, _gate(saved), factors, _scaling_lora(saved))


def _problems(options: dict[str, Any], adapters: Mapping[str, dict[str, Any]]) -> list[str]:
    """Why the mixture cannot be served, one sentence each."""
    problems = []
    if options.get("heads"):
        problems.append(f"heads ({options['heads']}) are trained modules beside the LM head, which engines do not have")
    for name, adapter in adapters.items():
        if adapter.get("use_dora"):
            problems.append(f"expert {name!r} uses DoRA, whose magnitudes depend on the base model's weights")
    outside = [layer for layer in options["layer_names"] if decoder_layer(layer) is None]
    if outside:
        problems.append(
            f"layers {outside[:5]} are adapted outside of the decoder layers (embeddings, the LM head), which the "
            "engine computes elsewhere: leave them out of the experts' target_modules"
        )
    return problems


def _factors(folder: Path, name: str, tensors: dict[str, Tensor], adapter: dict[str, Any]) -> dict[str, Factors]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = _KEY.fullmatch(key)
        if found is None:
            raise CheckpointError(
                f"{folder}/{EXPERTS_FOLDER}/{name}/{SAFETENSORS_WEIGHTS_NAME} has {key}, which no engine can serve"
            )
        layer, factor, kind = found.groups()
        parts.setdefault(layer, {})[f"{factor}.{kind}"] = value
    result = {}
    for layer, of in parts.items():
        down, up = of["lora_A.weight"], of["lora_B.weight"]
        if down.dim() != 2 or up.dim() != 2:
            raise ConfigError(f"layer {layer!r} is a convolution, whose experts no engine can serve")
        result[layer] = Factors(down, up, _scaling(adapter, layer, len(down)), of.get("lora_B.bias"))
    return result


def _scaling(adapter: dict[str, Any], layer: str, rank: int) -> float:
    """peft's scaling: alpha / r, or alpha / sqrt(r) if it is rank-stabilised (arXiv 2312.03732)."""
    alpha = _of_pattern(adapter.get("alpha_pattern") or {}, layer, adapter["lora_alpha"])
    return alpha / math.sqrt(rank) if adapter.get("use_rslora") else alpha / rank


def _of_pattern(patterns: dict[str, Any], layer: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the layer's name or its end."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", layer):
            return value
    return otherwise


def _gate(saved: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], ...]:
    tensors = {key.partition(_GATE_KEY)[2]: value.float() for key, value in saved.items() if _GATE_KEY in key}
    numbers = sorted({int(key.split(".")[0]) for key in tensors})
    return tuple((tensors[f"{number}.weight"], tensors[f"{number}.bias"]) for number in numbers)


def _scaling_lora(saved: dict[str, Tensor]) -> dict[str, Factors]:
    """The gate's own LoRA in the scaling pass, if it has one."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in saved.items():
        if (found := _LORA_KEY.fullmatch(key)) is not None:
            parts.setdefault(found[1], {})[found[2]] = value
    return {layer: Factors(of["down"], of["up"], 1.0) for layer, of in parts.items()}


def padded_rank(factors: Iterable[Factors | None]) -> int:
    """The largest rank of the experts, to which the others are padded with zeros."""
    return max((len(each.down) for each in factors if each is not None), default=0)

"""Folds a mixture with constant weights to one ordinary LoRA adapter, which peft, vLLM and LoRAX can load.

If the weights w do not depend on the token, the sum over a layer's experts is a LoRA adapter, whose rank is the sum of
their ranks:

    Σ_e  w_{l,e} · g · s_e · B_e A_e  =  [w_{l,1} g s_1 B_1, w_{l,2} g s_2 B_2, …] [A_1; A_2; …]

with peft's `scaling` s_e and the global weight g. This is exact. Servers use one rank and one scaling for the whole
adapter (vLLM does not support `rank_pattern`), so each layer is padded with zeros to the largest rank, and the scaling
is 1. Weights that differ between tokens cannot be folded: `mean_scalings` computes a gate's mean.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners import lora
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.base_model.backbone import vocabulary_size
from weft.base_model.devices import execution_device
from weft.checkpoint.adapter_keys import KEY_PREFIX
from weft.checkpoint.base_place import lasting_name
from weft.config import XLoraConfig
from weft.data.given import Given, several, some_tokens
from weft.data.padded import padded_batches
from weft.errors import AdapterError, ConfigError, DataError
from weft.files.ownership import FOLDED, refuse_used_folder
from weft.files.tensors import not_finite
from weft.files.writing import check_folder, replace_folder, settle
from weft.gate.routing import ConstantWeights, constant_scalings
from weft.model.heads import head_tensors, wrappers


@dataclass(frozen=True)
class _Part:
    """One expert in one layer.

    Attributes:
        down: A, [rank, ...].
        up: B, [out, rank / groups, ...].
        scale: w · g · s.
        bias: g · s · b, without w, as the weights do not apply to a `lora_bias`; None if there is none.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None


@torch.no_grad()
def fold(model: Any, output: str | os.PathLike[str], weights: ConstantWeights) -> LoraConfig:
    """Write a mixture with constant weights as one ordinary LoRA adapter.

        ΔW_l = Σ_e  w_{l,e} · g · s_e · B_e A_e        for each layer l

    This is exactly `model.fixed_scalings(weights)`. An expert with weight 0 in a layer adds no rank there, and a layer
    in which all weights are 0 is not a target of the adapter. If experts have a `lora_bias`, the adapter has one too,
    which peft loads but servers may not. The mixture's heads become the adapter's `modules_to_save`.

    Args:
        model: a mixture; it is not changed.
        output: a new or empty folder, or one with an adapter that was folded before, which is replaced.
        weights: expert name -> weight in all layers, 0 for experts that are not named; or a table [layer, expert] with
            a row for each of `model.xlora_config.layer_names`, such as the result of `mean_scalings`.

    Returns:
        The adapter's config; its `r` is the rank, which servers need.

    Raises:
        ConfigError: the weights do not fit the model or are all 0, or the folder has other files.
        AdapterError: an expert with a weight other than 0 has DoRA, or experts have a `lora_bias` and others adapt an
            embedding.
        CheckpointError: the folder cannot be written; it is unchanged.

    Example:
        >>> model = weft.from_pretrained("my-mixture")
        >>> weft.fold(model, "folded", {"math": 0.5, "code": 0.5})
        >>> peft.PeftModel.from_pretrained(base, "folded")  # base: a base model without the mixture
    """
    folder, options = Path(output), model.xlora_config
    check_output(folder, options)
    base = model.lora_model.model
    table = constant_scalings(weights, options.expert_names, len(options.layer_names))
    table = table.double() * options.global_scaling_weight
    layers: dict[str, tuple[Any, list[_Part]]] = {}
    for name, row in zip(options.layer_names, table.expand(len(options.layer_names), -1).tolist(), strict=True):
        layer = base.get_submodule(name)
        parts = _parts(layer, dict(zip(options.expert_names, row, strict=True)), options.global_scaling_weight)
        if any(part.scale or part.bias is not None for part in parts):
            layers[name] = layer, parts
    rank = _common_rank(layers)
    if rank == 0:
        raise ConfigError(
            f"weights ({weights}) with global_scaling_weight ({options.global_scaling_weight}) leave no expert acting "
            "in any layer: give one of them a weight other than 0"
        )
    with_bias = _with_bias(layers)
    dtype = reduce(
        torch.promote_types, (part.down.dtype for _, parts in layers.values() for part in parts if part.scale)
    )
    tensors = {
        f"{KEY_PREFIX}{name}.{key}": value
        for name, (layer, parts) in layers.items()
        for key, value in _folded(layer, parts, rank, dtype, with_bias=with_bias).items()
    }
    config = _adapter_config(model, list(layers), rank, with_bias=with_bias)
    tensors |= _heads(base) | _retrained(model, layers)
    broken = not_finite(tensors)
    if broken:
        raise AdapterError(f"the mixture cannot be folded, as {broken}: expected finite numbers")
    text = json.dumps(config.to_dict(), indent=2, sort_keys=True)

    def write(part: Path) -> None:
        save_file(tensors, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        (part / FOLDED).write_text(json.dumps({"format_version": 1}), encoding="utf-8")
        (part / CONFIG_NAME).write_text(text, encoding="utf-8")

    replace_folder(folder, write, CONFIG_NAME)
    return config


@torch.no_grad()
def mean_scalings(
    model: Any,
    sequences: Sequence[Given],
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda done: None,
    *,
    tokenizer: Any = None,
) -> Float[Tensor, "layer expert"]:
    """The gate's mean scalings, after top-k, over all tokens of some texts, as weights for `fold`.

        w_{l,e} = mean over tokens t of λ_{t,l,e}

    Args:
        model: a mixture in evaluation mode.
        sequences: token ids of each text, or, with a tokenizer, the texts (see `weft.trace`); all tokens have the same
            weight.
        batch_size: number of sequences per forward pass; no effect on the result.
        advance: called after each forward pass with its number of sequences.
        tokenizer: tokenizer of the base model, for texts.

    Returns:
        The table of weights, float32 on the CPU.

    Raises:
        ConfigError: the base model is an encoder-decoder, or a sequence is none of these.
        DataError: there are no sequences.
        RuntimeError: the gate does not run, because of `fixed_scalings` or `disable_adapter`.

    Example:
        >>> weights = weft.mean_scalings(model, ["def f(x):", "The contract says"], tokenizer=tokenizer)
        >>> weights.shape  # [layer, expert]
        >>> weft.fold(model, "folded", weights)
    """
    sequences = several(sequences, "sequences")
    if not len(sequences):
        raise DataError("sequences is empty: the gate's mean needs at least one text")
    if model.backbone.is_encoder_decoder:
        raise ConfigError(
            f"the base model ({type(model.backbone.base).__name__}) is an encoder-decoder, whose layers do not all "
            "follow the same tokens: expected a decoder or an encoder; give `fold` weights of your own"
        )
    if not model.passes.gate_decides:
        raise RuntimeError("the gate does not run inside of fixed_scalings() or disable_adapter(): leave them first")
    options = model.xlora_config
    total = torch.zeros(len(options.layer_names), len(options.expert_names), dtype=torch.float64)
    device = execution_device(model)
    vocabulary = vocabulary_size(model.backbone.base)
    rows = [
        some_tokens(given, f"sequence {number}", tokenizer, vocabulary=vocabulary)
        for number, given in enumerate(sequences)
    ]
    for input_ids, attention_mask in padded_batches(rows, batch_size):
        model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
        scalings = model.passes.followed()
        total += scalings[attention_mask.bool().to(scalings.device)].double().sum(0).cpu()
        advance(len(input_ids))
    return (total / sum(len(row) for row in rows)).float()


def check_output(folder: Path, options: XLoraConfig) -> None:
    """Raise if a folded adapter cannot be written to this folder, or would replace other files.

    Raises:
        ConfigError: it is the folder of an expert, has other files than a folded adapter, or cannot be written.
    """
    settle(folder, leftovers=True)
    for name, path in (options.adapters or {}).items():
        if folder.resolve() == Path(path).resolve():
            raise ConfigError(f"output ({folder}) is the folder of the expert {name!r}: choose another one")
    if not (folder / FOLDED).is_file():
        refuse_used_folder(folder)
    check_folder(folder, "output")


def _parts(layer: Any, weights: dict[str, float], global_weight: float) -> list[_Part]:
    """The experts of a layer; `weights` are already multiplied by g."""
    parts = []
    for expert, weight in weights.items():
        if expert in layer.lora_A:
            down, up = layer.lora_A[expert].weight, layer.lora_B[expert].weight
        elif expert in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[expert], layer.lora_embedding_B[expert]
        else:
            continue
        if weight and layer.use_dora.get(expert, False):
            raise AdapterError(
                f"expert {expert!r} uses DoRA, which no sum of LoRA factors can express, so that it cannot be folded: "
                "give it weight 0, or turn it into a plain LoRA with peft's convert_to_lora"
            )
        scaling = layer.scaling[expert]
        bias = layer.lora_B[expert].bias * (scaling * global_weight) if layer.lora_bias[expert] else None
        parts.append(_Part(down, up, weight * scaling, bias))
    return parts


def _groups(layer: Any) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)  # of a convolution


def _common_rank(layers: dict[str, tuple[Any, list[_Part]]]) -> int:
    """The smallest rank for the experts of all layers that is a multiple of the groups of each convolution."""
    needed = max((sum(len(part.down) for part in parts if part.scale) for _, parts in layers.values()), default=0)
    groups = math.lcm(*(_groups(layer) for layer, _ in layers.values()))
    return math.ceil(needed / groups) * groups


def _with_bias(layers: dict[str, tuple[Any, list[_Part]]]) -> bool:
    """Whether the adapter needs `lora_bias`.

    Raises:
        AdapterError: it needs one, but peft does not support it for one of the layers.
    """
    with_bias = any(part.bias is not None for _, parts in layers.values() for part in parts)
    for name, (layer, _) in layers.items():
        if with_bias and isinstance(layer, lora.Embedding):
            raise AdapterError(
                f"some experts have lora_bias (True), and others adapt the embedding {name!r}, for which peft has no "
                "lora_bias: they cannot be one adapter. Fold a mixture of one kind only"
            )
    return with_bias


def _folded(layer: Any, parts: list[_Part], rank: int, dtype: torch.dtype, *, with_bias: bool) -> dict[str, Tensor]:
    """A layer's tensors, under their keys in an adapter file."""
    # The ranks of a grouped convolution are in group-major order, so the experts are joined in each group.
    groups = _groups(layer)
    some = parts[0]
    down = torch.zeros(groups, rank // groups, *some.down.shape[1:], dtype=dtype)
    up = torch.zeros(some.up.shape[0], rank // groups, *some.up.shape[2:], dtype=dtype)
    start = 0
    for part in parts:
        if part.scale:
            stop = start + part.up.shape[1]
            down[:, start:stop] = part.down.unflatten(0, (groups, stop - start))
            up[:, start:stop] = part.up.to(dtype) * part.scale
            start = stop
    if isinstance(layer, lora.Embedding):
        return {"lora_embedding_A": down.flatten(0, 1), "lora_embedding_B": up}
    tensors = {"lora_A.weight": down.flatten(0, 1), "lora_B.weight": up}
    if with_bias:
        bias = torch.zeros(some.up.shape[0], dtype=dtype)
        for part in parts:
            if part.bias is not None:
                bias += part.bias.to(bias)
        tensors["lora_B.bias"] = bias
    return tensors


def _heads(base: nn.Module) -> dict[str, Tensor]:
    return {f"{KEY_PREFIX}{key}": value.contiguous() for key, value in head_tensors(base).items()}


def _retrained(model: Any, adapted: Container[str]) -> dict[str, Tensor]:
    """The full base-model weights of the experts, under peft's keys."""
    return {
        f"{KEY_PREFIX}{path}.{'base_layer.' if path in adapted else ''}{key}": value.clone()
        for path, module in model.retrained.modules().items()
        for key, value in module.state_dict().items()
    }


def _adapter_config(model: Any, layer_names: list[str], rank: int, *, with_bias: bool) -> LoraConfig:
    base, options = model.lora_model.model, model.xlora_config
    expert = model.lora_model.peft_config[options.expert_names[0]]
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the scaling is 1, as B includes each expert's scaling
        lora_bias=with_bias,
        fan_in_fan_out=any(isinstance(base.get_submodule(name).get_base_layer(), Conv1D) for name in layer_names),
        base_model_name_or_path=lasting_name(options.base_model_name_or_path or expert.base_model_name_or_path),
        task_type=options.task_type or expert.task_type,
        auto_mapping=expert.auto_mapping,
        inference_mode=True,
    )
    # Not by the constructor, which converts it to a set without a fixed order in the file.
    config.target_modules = _target_modules(base, layer_names)
    whole = [path for path in model.retrained.modules() if path not in layer_names]
    config.modules_to_save = [*(path for path, _ in wrappers(base)), *whole] or None
    return config


def _target_modules(base: nn.Module, layer_names: list[str]) -> list[str] | str:
    """The shortest suffixes of these layers' names that match no other module; a regular expression if there are none.

    peft's `target_modules` are such suffixes.
    """
    adapted = [name for name, module in base.named_modules() if isinstance(module, lora.LoraLayer)]
    inside = tuple(f"{name}." for name in adapted)
    own = {name for name, _ in base.named_modules() if not name.startswith(inside)}
    taken = {ending for name in own.difference(layer_names) for ending in _endings(name)}
    targets = set()
    for name in layer_names:
        free = [ending for ending in _endings(name) if ending not in taken]
        if not free:
            return "|".join(re.escape(name) for name in layer_names)
        targets.add(free[0])
    return sorted(targets)


def _endings(name: str) -> list[str]:
    """The suffixes with which peft's `target_modules` match a name: "a.b.c" -> ["c", "b.c", "a.b.c"]."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]

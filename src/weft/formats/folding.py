"""A constant mixture as one ordinary LoRA adapter, which peft, vLLM and LoRAX load like any other.

Where the weights w do not depend on the token, the sum over a layer's experts is a LoRA itself, whose rank is the sum
of theirs:

    Σ_e  w_{l,e} · g · s_e · B_e A_e  =  [w_{l,1} g s_1 B_1, w_{l,2} g s_2 B_2, …] [A_1; A_2; …]

with s_e peft's `scaling` and g the global weight. Nothing is approximated. Servers read one rank and one scaling for
the whole adapter (vLLM knows no `rank_pattern`), so every layer is filled up with zeros to the largest rank, and the
scaling is 1. What varies from token to token cannot be folded: `mean_scalings` keeps a gate's average.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container
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

from weft.base_model.devices import execution_device
from weft.checkpoint.adapter_keys import KEY_PREFIX
from weft.config import XLoraConfig
from weft.data.padded import padded_batches
from weft.errors import AdapterError, ConfigError, DataError
from weft.files.ownership import refuse_used_folder
from weft.files.tensors import not_finite
from weft.files.writing import check_folder, replace_folder, settle
from weft.gate.routing import ConstantWeights, constant_scalings
from weft.model.heads import head_tensors, wrappers

# Beside the adapter: it was folded, and may be folded anew. (Metadata of safetensors have no order, so that two keys
# there would make files of the same tensors differ.)
MARK = "weft_fold.json"


@dataclass(frozen=True)
class _Part:
    """One expert in one layer.

    Attributes:
        down: A, [rank, ...].
        up: B, [out, rank / groups, ...].
        scale: w · g · s.
        bias: g · s · b, whatever w: a `lora_bias` stands outside of the weights.
    """

    down: Tensor
    up: Tensor
    scale: float
    bias: Tensor | None


@torch.no_grad()
def fold(model: Any, output: str | os.PathLike[str], weights: ConstantWeights) -> LoraConfig:
    """Write the mixture with these constant weights as one ordinary LoRA adapter.

    Its change of layer l is Σ_e w_{l,e} · g · s_e · B_e A_e, exactly that of `model.fixed_scalings(weights)`. An expert
    whose weight is 0 in a layer takes no rank there; a layer where none acts is no target of the adapter. Where experts
    have a `lora_bias`, so has the adapter: peft loads it, servers may not. The mixture's heads become the adapter's
    `modules_to_save`.

    Args:
        model: an X-LoRA model, as `weft.from_pretrained` gives it; it stays as it is.
        output: a new or empty folder, or that of an ordinary adapter, which is replaced.
        weights: expert name -> weight in all layers, experts left out having weight 0; or a table [layer, expert] with
            a row for each of `model.xlora_config.layer_names`, such as `mean_scalings` gives.

    Returns:
        The adapter's config as written; its `r` is the rank to serve.

    Raises:
        ConfigError: the weights do not fit the model or are all 0, or the folder holds something else.
        AdapterError: the experts' `lora_bias` cannot be written together with an embedding, or an expert that acts has
            DoRA.
        CheckpointError: the folder cannot be written; it is as it was.

    Example:
        >>> model = weft.from_pretrained("my-mixture")
        >>> weft.fold(model, "folded", {"math": 0.5, "code": 0.5})
        >>> peft.PeftModel.from_pretrained(base, "folded")
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
        (part / MARK).write_text(json.dumps({"format_version": 1}), encoding="utf-8")
        (part / CONFIG_NAME).write_text(text, encoding="utf-8")

    replace_folder(folder, write, CONFIG_NAME)
    return config


@torch.no_grad()
def mean_scalings(
    model: Any,
    sequences: list[list[int]],
    batch_size: int = 4,
    advance: Callable[[int], None] = lambda done: None,
) -> Float[Tensor, "layer expert"]:
    """The gate's scalings, after top-k, on average over all tokens of some texts: weights for `fold`.

    w_{l,e} = mean over tokens t of λ_{t,l,e}. This keeps how much of each expert the gate takes in each layer, and
    loses what it decides from token to token.

    Args:
        model: an X-LoRA model in evaluation mode.
        sequences: token ids; every token counts the same.
        batch_size: sequences per forward pass; without effect on the result.
        advance: called with the number of sequences done, after each forward pass.

    Raises:
        ConfigError: the base model is an encoder-decoder.
        DataError: there are no sequences.
        RuntimeError: the gate does not run, inside of `fixed_scalings` or `disable_adapter`.

    Example:
        >>> weights = weft.mean_scalings(model, tokenizer(texts)["input_ids"])
        >>> weights.shape  # [layer, expert]
        >>> weft.fold(model, "folded", weights)
    """
    if not sequences:
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
    for input_ids, attention_mask in padded_batches(sequences, batch_size):
        model(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False)
        scalings = model.passes.followed()
        total += scalings[attention_mask.bool().to(scalings.device)].double().sum(0).cpu()
        advance(len(input_ids))
    return (total / sum(len(sequence) for sequence in sequences)).float()


def check_output(folder: Path, options: XLoraConfig) -> None:
    """Raise where writing an adapter to this folder would spoil something.

    Raises:
        ConfigError: it is an expert's own, holds something else than an adapter that was folded before, or cannot be
            written.
    """
    settle(folder, leftovers=True)
    for name, path in (options.adapters or {}).items():
        if folder.resolve() == Path(path).resolve():
            raise ConfigError(f"output ({folder}) is the folder of the expert {name!r}: choose another one")
    if not (folder / MARK).is_file():
        refuse_used_folder(folder)
    check_folder(folder, "output")


def _parts(layer: Any, weights: dict[str, float], global_weight: float) -> list[_Part]:
    """The experts that a layer has; `weights` has g in it."""
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
    """The smallest rank that holds every layer's experts, and that the groups of every convolution divide."""
    needed = max((sum(len(part.down) for part in parts if part.scale) for _, parts in layers.values()), default=0)
    groups = math.lcm(*(_groups(layer) for layer, _ in layers.values()))
    return math.ceil(needed / groups) * groups


def _with_bias(layers: dict[str, tuple[Any, list[_Part]]]) -> bool:
    """Whether the adapter needs `lora_bias`.

    Raises:
        AdapterError: it does, and peft knows none for one of the layers.
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
    """A layer's tensors, under their names in an adapter file."""
    # The ranks of a grouped convolution belong to one group after the other, so experts are joined within each group.
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
    """What the experts brought along for the base model, under the names by which peft puts it there."""
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
        lora_alpha=rank,  # the scaling is 1: each expert's own is in B
        lora_bias=with_bias,
        fan_in_fan_out=any(isinstance(base.get_submodule(name).get_base_layer(), Conv1D) for name in layer_names),
        base_model_name_or_path=options.base_model_name_or_path or expert.base_model_name_or_path,
        task_type=options.task_type or expert.task_type,
        auto_mapping=expert.auto_mapping,
        inference_mode=True,
    )
    # Not through the constructor, which makes a set of it, whose order in the file is chance.
    config.target_modules = _target_modules(base, layer_names)
    whole = [path for path in model.retrained.modules() if path not in layer_names]
    config.modules_to_save = [*(path for path, _ in wrappers(base)), *whole] or None
    return config


def _target_modules(base: nn.Module, layer_names: list[str]) -> list[str] | str:
    """The shortest endings of these layers' names that no other module's name has; a pattern where there are none."""
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
    """What peft's `target_modules` match this name by: "a.b.c" -> ["c", "b.c", "a.b.c"]."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]

"""Checks the sizes of a saved gate against its options, before a gate is built from them."""

from __future__ import annotations

import re
from typing import Any

from weft.checkpoint.adapter_keys import without_wrappers
from weft.checkpoint.folder import SavedMixture
from weft.errors import CheckpointError, bullet_list
from weft.files.tensors import preview

# The weights of the gate's linear layers, in peft's layout and in the original library's.
_LINEAR = re.compile(r"(?:.*internal_xlora_classifier\.layers|inner)\.(\d+)\.weight")
_LAST = "last.weight"


def refuse_other_sizes(config: Any, saved: SavedMixture) -> None:
    """Raise if a saved gate does not have the sizes in the options. Without a saved gate, nothing is checked.

    Args:
        config: the options.
        saved: the folder from which they were read.

    Raises:
        CheckpointError: the gate has other sizes; all differences at once.
    """
    gate = saved.tensors.get(saved.gate_file, {})
    shapes = {without_wrappers(key): tuple(value.shape) for key, value in gate.items()}
    numbers = {key: match[1] for key in shapes if (match := _LINEAR.fullmatch(key))}
    keys = sorted(numbers, key=lambda key: (len(numbers[key]), numbers[key])) + [key for key in shapes if key == _LAST]
    weights = {key: shapes[key] for key in keys}
    if not weights:
        return
    problems = size_problems(config, weights, is_composed=_LAST in keys)
    if problems:
        raise CheckpointError(f"{saved.file} does not fit the gate in {saved.gate_file}:{bullet_list(problems)}")


def size_problems(config: Any, weights: dict[str, tuple[int, ...]], *, is_composed: bool = False) -> list[str]:
    """Where a gate's options differ from the shapes of its linear layers, one sentence each.

    Args:
        config: the options.
        weights: key -> shape `[out, in]`, in the order of the layers.
        is_composed: several linear layers without ReLU may be saved for a gate of depth 1 (see `xlora_layout.py`).
    """
    odd = {key: shape for key, shape in weights.items() if len(shape) != 2}
    if odd:
        return [f"{key} has shape {list(shape)}, expected two axes" for key, shape in odd.items()]
    shapes = list(weights.values())
    first, last = shapes[0], shapes[-1]
    if config.xlora_depth != len(weights) and not (is_composed and config.xlora_depth == 1):
        found = preview(list(weights))
        return [f"xlora_depth ({config.xlora_depth}) must be {len(weights)}, as its linear layers are {found}"]
    problems = [
        f"{key} reads {after[1]} values, and the layer before it gives {before[0]}"
        for key, before, after in zip([*weights][1:], shapes, shapes[1:], strict=False)
        if before[0] != after[1]
    ]
    if config.hidden_size is not None and config.hidden_size != first[1]:
        problems.append(f"hidden_size ({config.hidden_size}) must be {first[1]}, the width that it reads")
    if len(weights) > 1 and config.xlora_depth > 1 and config.xlora_size != first[0]:
        problems.append(f"xlora_size ({config.xlora_size}) must be {first[0]}, the width of its hidden layers")
    return problems + _output_problems(config, last[0])


def _output_problems(config: Any, outputs: int) -> list[str]:
    experts = f"{config.num_experts} experts ({', '.join(config.adapters or {})})"
    if not config.layerwise_scalings:
        return [] if outputs == config.num_experts else [f"{experts} must be {outputs}, the number of its outputs"]
    if config.layer_names is None:
        if outputs % config.num_experts == 0:
            return []
        return [f"{experts} do not divide its {outputs} outputs: expected one for each expert in each layer"]
    layers = len(config.layer_names)
    if outputs == config.num_experts * layers:
        return []
    # With gate_layer, the layers before it have no outputs.
    if config.gate_layer is not None and outputs < config.num_experts * layers and outputs % config.num_experts == 0:
        return []
    return [f"{experts} in {layers} layers must have {config.num_experts * layers} outputs, and it has {outputs}"]

"""The layout of the original xlora library, read into weft's options and gate.

    xlora_config.json                the options
    xlora_classifier.safetensors     the gate: inner.{i}.weight, inner.{i}.bias, last.weight, last.bias
    NAME/ or adapters/NAME/          each expert, an ordinary peft adapter

The gate's outputs have the same order as weft's: [layer, expert], flattened with the expert as the last axis, and the
LoRA layers in the order of the base model's modules. The index i counts Linear, ReLU and Dropout (0, 3, 6, ...), or
only Linear layers if `enable_relu_and_dropout` is off. Without ReLU the layers are composed to one linear layer:

    W_d (... (W_1 h + b_1) ...) + b_d = (W_d ... W_1) h + (... + W_d b_1 + b_d)
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from torch import Tensor

from weft.errors import CheckpointError, ConfigError
from weft.files.names import name_problems
from weft.files.reading import JsonTable, is_number, read_json
from weft.files.tensors import Opened, taken

ORIGINAL_CONFIG = "xlora_config.json"
ORIGINAL_GATE = "xlora_classifier.safetensors"
TRAINED_ADAPTERS = "adapters"
PEFT_GATE = "base_model.internal_xlora_classifier.layers"
# Options with the same name and meaning in both libraries.
SHARED_OPTIONS = (
    "hidden_size",
    "enable_softmax",
    "enable_softmax_topk",
    "layerwise_scalings",
    "xlora_depth",
    "xlora_size",
    "xlora_dropout_p",
    "use_trainable_adapters",
    "softmax_temperature",
    "top_k_lora",
    "scaling_pass_value",
    "global_scaling_weight",
)
_NUMBERS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_OWN_OPTIONS = (
    "adapters",
    "base_model_id",
    "device",
    "enable_relu_and_dropout",
    "stop_token_id",
    "use_bias",
    "use_mean_pool",
)


def is_original(folder: Path) -> bool:
    """Whether a folder is in the original library's layout, and not in peft's or weft's."""
    return os.path.isfile(folder / ORIGINAL_CONFIG) and not os.path.lexists(folder / CONFIG_NAME)


def original_options(folder: Path, adapters: dict[str, str] | None = None) -> dict[str, Any]:
    """The arguments of an `XLoraConfig` for a folder of the original library.

    Args:
        folder: the folder.
        adapters: name -> path of the experts, if they are not where the folder says. If the folder does not name them,
            this must have the order of the gate's outputs.

    Raises:
        CheckpointError: a file is missing or broken, or weft does not have this kind of gate.
    """
    file = folder / ORIGINAL_CONFIG
    saved = read_json(file)
    _refuse_other_gates(file, saved)
    named = _saved_adapters(saved)
    problems = name_problems(named)  # before they are used as folders
    if problems:
        raise ConfigError(f"{file} cannot be read:", problems)
    if not named and adapters is None:
        found = sorted(str(at.parent.relative_to(folder)) for at in folder.rglob(CONFIG_NAME))
        raise CheckpointError(
            f"{file} does not name its adapters: give them with adapters={{name: path}}, in the order in which the "
            f"gate was trained; adapters in the folder: {', '.join(found) or 'none'}"
        )
    options: dict[str, Any] = {"layerwise_scalings": False}  # that library's default
    options |= {name: value for name, value in saved.items() if name not in _OWN_OPTIONS}  # unknown ones are refused
    if not _has_relu(saved):
        options["xlora_depth"] = 1
    given = dict(adapters) if adapters is not None else {n: _resolve(folder, n, at) for n, at in named.items()}
    options["adapters"] = given
    options["expert_names"] = list(named or given)
    options["base_model_name_or_path"] = saved.string("base_model_id", None) or None
    return options


def original_base(folder: Path) -> str | None:
    """The path or Hub id of the base model; None if the folder does not name it."""
    return read_json(folder / ORIGINAL_CONFIG).string("base_model_id", None) or None


def read_original_gate(folder: Path, opened: Opened | None = None) -> dict[str, Tensor]:
    """The gate's tensors under the keys of peft and weft, in float32 or wider.

    Args:
        folder: the mixture's folder.
        opened: tensors that were read already; the gate's are removed.

    Raises:
        CheckpointError: the file is missing, broken or a pickle, or does not fit the options.
    """
    file = folder / ORIGINAL_GATE
    if not os.path.lexists(file) and os.path.lexists(folder / "xlora_classifier.pt"):
        raise CheckpointError(
            f"{folder} holds the gate as a pickle (xlora_classifier.pt), which weft does not open: save it again with "
            "xlora's safe_serialization=True"
        )
    saved = read_json(folder / ORIGINAL_CONFIG)
    has_relu, dropout = _has_relu(saved), saved.get("xlora_dropout_p", 0.2)
    if not is_number(dropout):
        raise saved.wrong("xlora_dropout_p", "a finite number")
    tensors = taken(file, opened)
    weights, biases = _linear_layers(file, tensors, saved.whole("xlora_depth", 1, least=1), 3 if has_relu else 1)
    if not has_relu:
        weights, biases = _composed(weights, biases)
    # peft's nn.Sequential has Linear, ReLU and, if it is above 0, Dropout.
    step = 3 if dropout > 0 else 2
    gate = {}
    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        gate[f"{PEFT_GATE}.{number * step}.weight"] = weight
        gate[f"{PEFT_GATE}.{number * step}.bias"] = bias
    return gate


def _linear_layers(
    file: Path, tensors: dict[str, Tensor], depth: int, stride: int
) -> tuple[list[Tensor], list[Tensor]]:
    """(weights, biases) of all linear layers in order; a missing bias is zero."""
    # Limited, as a wrong depth could be so large that the missing layers cannot all be named.
    names = [f"inner.{number * stride}" for number in range(min(depth, len(tensors) + 1) - 1)] + ["last"]
    expected = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    missing = [f"{name}.weight" for name in names if f"{name}.weight" not in tensors]
    unexpected = sorted(tensors.keys() - expected)
    biased = [name for name in names if f"{name}.bias" in tensors]
    if missing or unexpected or len(biased) not in (0, len(names)):
        raise CheckpointError(
            f"{file} is no gate of xlora_depth ({depth}) with layers {', '.join(names)} as {ORIGINAL_CONFIG} says; "
            f"missing: {missing or 'none'}, unexpected: {unexpected or 'none'}, with a bias: {biased or 'none'}"
        )
    _refuse_odd_shapes(file, tensors, names)
    wide = torch.promote_types(tensors["last.weight"].dtype, torch.float32)
    weights = [tensors[f"{name}.weight"].to(wide) for name in names]
    biases = [
        tensors[f"{name}.bias"].to(wide) if name in biased else weight.new_zeros(len(weight))
        for name, weight in zip(names, weights, strict=True)
    ]
    return weights, biases


def _refuse_odd_shapes(file: Path, tensors: dict[str, Tensor], names: list[str]) -> None:
    """Raise if the tensors have other dtypes, or shapes that are not those of successive linear layers."""
    width: int | None = None
    for name in names:
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        fits = weight.dim() == 2 and width in (None, weight.shape[1])
        fits = fits and (bias is None or bias.shape == weight.shape[:1])
        numbers = {weight.dtype, weight.dtype if bias is None else bias.dtype} <= _NUMBERS
        if not fits or not numbers:
            found = ", ".join(f"{key} {list(value.shape)} {value.dtype}" for key, value in sorted(tensors.items()))
            raise CheckpointError(
                f"{file} must hold linear layers, each as wide as the one before it gives, in float16 or wider: "
                f"found {found}"
            )
        width = len(weight)


def _composed(weights: list[Tensor], biases: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Compose successive linear layers to one, in float64."""
    weight, bias = weights[0].double(), biases[0].double()
    for next_weight, next_bias in zip(weights[1:], biases[1:], strict=True):
        weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
    return [weight.to(weights[0].dtype)], [bias.to(weights[0].dtype)]


def _has_relu(saved: dict[str, Any]) -> bool:
    """Whether there are ReLU and dropout between the gate's linear layers."""
    return bool(saved.get("enable_relu_and_dropout", False))


def _refuse_other_gates(file: Path, saved: JsonTable) -> None:
    if saved.get("use_mean_pool"):
        raise CheckpointError(
            f"{file} has use_mean_pool (true): the gate decides once for a whole text, where weft's decides for each "
            "token. It must be trained anew, from the adapters"
        )
    if saved.get("enable_softmax_topk") and not saved.get("enable_softmax", True):
        raise CheckpointError(
            f"{file} has enable_softmax_topk (true), which the original library computes over all tokens of a batch "
            "together and weft token by token: the weights would be others. Set it to false in the file to have the "
            "kept outputs as they are, or train the gate anew"
        )
    if saved.get("stop_token_id") is not None:
        # Configs kept this option after it had lost its effect, so it does not tell which kind of gate this is.
        warnings.warn(
            f"{file} has stop_token_id ({saved['stop_token_id']}): if it was saved before xlora decided token by "
            "token, its gate expects the text's last token only; weft lets it decide for each token",
            stacklevel=2,
        )


def _saved_adapters(saved: JsonTable) -> dict[str, str]:
    """name -> path of the adapters in the file; the library writes a list of names, or such a dict."""
    if isinstance(saved.get("adapters"), dict):
        table = saved.table("adapters")
        return {name: table.string(name) for name in table}
    names = saved.strings("adapters", None) or []
    if len(set(names)) < len(names):
        raise saved.wrong("adapters", "names that differ")
    return {name: name for name in names}


def _resolve(folder: Path, name: str, path: str) -> str:
    """An expert's folder: in `folder` under its path, its name or the last part of its path; else its path unchanged.

    A repository on the Hub names its own folders as user/repository/folder, so that only the last part exists.
    """
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
    inside: Iterable[str] = (path, f"{TRAINED_ADAPTERS}/{name}", name, last)
    for candidate in inside:
        if not os.path.isabs(candidate) and os.path.isfile(folder / candidate / CONFIG_NAME):
            return str(folder / candidate)
    if os.path.isfile(folder / f"{name}_config.json"):
        raise CheckpointError(
            f"{folder} is in mistral.rs's flat layout ({name}_config.json): read it with  weft convert {folder} --to "
            "weft --output FOLDER"
        )
    return path.rstrip("/") or name

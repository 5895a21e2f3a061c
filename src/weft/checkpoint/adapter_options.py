"""Checks of an adapter's options before peft reads them: types, ranges, and the ranks of the stored tensors.

The type of an option comes from peft's `LoraConfig`, so that it is right for each version of peft.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from peft import LoraConfig
from torch import Tensor

from weft.files.reading import is_number, is_whole, shown

# peft annotates these as int, but only multiplies and divides by them: 0.5 works.
_NUMBERS = ("lora_alpha",)
# A regular expression if the value is one string.
_EXPRESSIONS = ("target_modules", "exclude_modules")
# The string, or each string in the list or dict, is a regular expression.
_PATTERNS = ("modules_to_save", "layers_pattern", "rank_pattern", "alpha_pattern")
_FACTORS = (".lora_A.weight", ".lora_embedding_A")


def option_problems(values: Mapping[str, Any]) -> list[str]:
    """The problems of the values in an adapter's `adapter_config.json`, one sentence each.

    Options that this version of peft does not know are not checked.

    Example:
        >>> option_problems({"peft_type": "LORA", "r": "8"})
        ["r ('8') must be a whole number"]
    """
    kinds = _kinds()
    problems = [
        f"{name} ({shown(value)}) must be {_in_words(kinds[name])}"
        for name, value in values.items()
        if name in kinds and not _fits(value, kinds[name])
    ]
    return problems or [*_range_problems(values), *_expression_problems(values)]


def rank_problems(config: LoraConfig, weights: Mapping[str, Tensor]) -> list[str]:
    """Where the ranks in an adapter's options differ from those of its tensors, one sentence each.

    This is checked before peft allocates tensors of the given ranks.

    Args:
        config: the adapter's options, with valid types.
        weights: the adapter's tensors under peft's keys.
    """
    stored = {key: value for key, value in weights.items() if key.endswith(_FACTORS)}
    if not stored:
        return ["it holds no lora_A or lora_embedding_A: expected the factors of a LoRA"]
    shapeless = [key for key, value in stored.items() if value.dim() < 2]
    if shapeless:
        return [f"{shapeless[0]} has shape {list(stored[shapeless[0]].shape)}, expected two axes or more"]
    odd = [key for key, value in weights.items() if ".lora_" in key and not value.is_floating_point()]
    if odd:
        return [f"{odd[0]} is of dtype {weights[odd[0]].dtype}, expected floating-point numbers"]
    patterns = config.rank_pattern or {}
    ranks = {"r": config.r, **{f"rank_pattern of {key!r}": rank for key, rank in patterns.items()}}
    # A rank pattern may be for layers that are not in the file, but no rank is larger than the widest layer.
    widest = max(size for key, value in weights.items() if ".lora_" in key for size in value.shape)
    problems = [
        f"{name} ({rank}) is more than any size of its tensors ({widest}): expected the rank that it was trained with"
        for name, rank in ranks.items()
        if rank > widest
    ]
    for key, value in stored.items():
        if len(value) not in ranks.values():
            problems.append(
                f"{' and '.join(f'{name} ({rank})' for name, rank in list(ranks.items())[:3])} must be the rank of its "
                f"tensors: {key} has {len(value)}"
            )
            break
    return problems


def _range_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    ranks = {"r": values.get("r", 1)}
    ranks |= {f"rank_pattern of {key!r}": rank for key, rank in (values.get("rank_pattern") or {}).items()}
    for name, rank in ranks.items():
        if not is_whole(rank) or rank < 1:
            problems.append(f"{name} ({shown(rank)}) must be a whole number of at least 1")
    for key, alpha in (values.get("alpha_pattern") or {}).items():
        if not is_number(alpha):
            problems.append(f"alpha_pattern of {key!r} ({shown(alpha)}) must be a finite number")
    dropout = values.get("lora_dropout", 0.0)
    if not 0 <= dropout <= 1:
        problems.append(f"lora_dropout ({dropout}) must be in [0, 1]")
    return problems


def _expression_problems(values: Mapping[str, Any]) -> list[str]:
    found = [(name, values[name]) for name in _EXPRESSIONS if isinstance(values.get(name), str)]
    for name in _PATTERNS:
        value = values.get(name) or ()
        found += [(name, one) for one in ([value] if isinstance(value, str) else value)]
    problems = []
    for name, expression in found:
        try:
            re.compile(expression)
        except (re.error, RecursionError, OverflowError) as err:
            problems.append(f"{name} ({shown(expression)}) is no regular expression: {err}")
    return problems


@functools.cache
def _kinds() -> dict[str, Any]:
    """The type of each option that can be in a file."""
    hints = typing.get_type_hints(LoraConfig)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(LoraConfig) if field.init}
    kinds.pop("runtime_config", None)  # peft does not read it from files
    return {**kinds, **dict.fromkeys(_NUMBERS, float)}


_PLAIN: dict[Any, Callable[[Any], bool]] = {
    bool: lambda value: value is None or isinstance(value, bool),  # some tools write null for false
    int: is_whole,
    float: is_number,
    type(None): lambda value: value is None,
}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value fits a type."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (list, tuple):
        kinds = parts if origin is tuple else parts * len(value) if isinstance(value, list) else ()
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict:
        return isinstance(value, dict) and all(_fits(one, parts[1]) for one in value.values())
    if _is_of_strings(kind):
        return isinstance(value, str)
    return value is None or isinstance(value, dict)  # a dict, or a dataclass of options


def _is_of_strings(kind: Any) -> bool:
    """Whether the values of a type are strings in JSON (str, Literal, Enum)."""
    return typing.get_origin(kind) is typing.Literal or (isinstance(kind, type) and issubclass(kind, (str, Enum)))


def _in_words(kind: Any) -> str:
    """A type, in words for a message."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        # Sorted, as typing remembers a union of these in the order in which any library wrote it first.
        ordered = sorted(parts, key=lambda part: (part is type(None), typing.get_origin(part) is not list, str(part)))
        return " or ".join(dict.fromkeys(map(_in_words, ordered)))
    if origin is list:
        return f"a list, each {_in_words(parts[0])}"
    names = {bool: "true or false", int: "a whole number", float: "a finite number", type(None): "null"}
    if kind in names:
        return names[kind]
    if _is_of_strings(kind):
        return "a string"
    return "a list" if origin is tuple else "a JSON object"

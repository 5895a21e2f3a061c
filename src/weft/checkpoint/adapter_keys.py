"""The keys of tensors in adapter files, in the form in which peft writes them.

Other tools write other keys. An adapter of a compiled or sharded model has attribute names of the wrappers in its keys.
A plain state dict has the adapter's name in them. Keys from a model without peft's `PeftModel` have no prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from weft.errors import CheckpointError

KEY_PREFIX = "base_model.model."
TOKEN_LAYER = ".token_adapter."  # peft's layer around an embedding, some rows of which are trained
TOKEN_ROWS = f"{TOKEN_LAYER}trainable_tokens_delta"
OF_LAYER = ".base_layer."  # in the keys of base weights inside a LoRA layer
# The attribute names for the wrapped module: torch.compile, FSDP, activation checkpointing, Lightning.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
# The attribute of DistributedDataParallel. A model may have an attribute of this name, too.
_MODULE = "module"
_ADAPTER_NAMES = (
    (re.compile(r"\.(lora_[AB])\.[^.]+\.(weight|bias)$"), r".\1.\2"),
    (re.compile(r"\.(lora_embedding_[AB])\.[^.]+$"), r".\1"),
    (re.compile(r"\.lora_magnitude_vector\..+$"), ".lora_magnitude_vector"),
    (re.compile(r"\.modules_to_save\.(?:[^.]+\.)?(?=[^.])"), "."),
    (re.compile(rf"{re.escape(TOKEN_ROWS)}\.[^.]+$"), TOKEN_ROWS),
)
# Copies of the base model's weights, which plain state dicts contain beside the trained weights.
_COPIES = (".original_module.", ".token_adapter.trainable_tokens_original.", ".token_adapter.token_indices.")


def without_wrappers(key: str) -> str:
    """A key without the attribute names of wrappers."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[0] == _MODULE and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def own_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors under peft's keys.

    Raises:
        CheckpointError: two different tensors get the same key, for example because a file holds several adapters.
    """
    found: dict[str, str] = {}
    for key in tensors:
        if any(copy in key for copy in _COPIES):
            continue
        own = _own_key(key)
        if own in found and not torch.equal(tensors[key], tensors[found[own]]):
            raise CheckpointError(
                f"its tensors {found[own]} and {key} are both {own}: expected one adapter in a file. Save it again "
                "with peft's save_pretrained"
            )
        found[own] = key
    return {own: tensors[key] for own, key in found.items()}


def _own_key(key: str) -> str:
    key = without_wrappers(key)
    while key.startswith(KEY_PREFIX):
        key = key.removeprefix(KEY_PREFIX)
    for pattern, replacement in _ADAPTER_NAMES:
        key = pattern.sub(replacement, key)
    return f"{KEY_PREFIX}{key}"


def brought_keys(keys: Iterable[str], heads: Iterable[str] = ()) -> list[str]:
    """The keys of full base-model weights in an adapter, without copies of the weights inside LoRA layers.

    Args:
        keys: the adapter's keys, in peft's form.
        heads: paths of modules whose weights are ignored, because the mixture has its own.
    """
    return [
        key
        for key in keys
        if ".lora_" not in key and OF_LAYER not in key and not any(f".{head}." in key for head in heads)
    ]


def fitted(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, with `module` removed from a key if the shorter key is an expected one (DistributedDataParallel)."""

    def own(key: str) -> str:
        shorter = ".".join(part for part in key.split(".") if part != _MODULE)
        return shorter if key not in expected and shorter in expected and shorter not in tensors else key

    return {own(key): value for key, value in tensors.items()}

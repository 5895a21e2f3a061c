"""Writes the layout of the original xlora library (`checkpoint/xlora_layout.py` reads it)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from weft.checkpoint.base_place import lasting_name
from weft.checkpoint.xlora_layout import ORIGINAL_CONFIG, ORIGINAL_GATE, SHARED_OPTIONS, TRAINED_ADAPTERS
from weft.formats.layout import common_problems, copy_expert, layers_where, save_tensors, write_json
from weft.formats.mixture import MixtureFiles


def xlora_problems(files: MixtureFiles, library: str = "the original xlora") -> list[str]:
    """What the original library, or one with its layout, does not support in a mixture, one sentence each."""
    problems = common_problems(files, library)
    embeddings = layers_where(files, lambda key, value: ".lora_embedding_" in key)
    if embeddings:
        problems.append(f"layers {embeddings[:5]} are embeddings, whose experts {library} cannot mix")
    if files.config.enable_softmax_topk:
        problems.append(
            f"enable_softmax_topk (True): {library} has no softmax over each token's kept experts; with it off, and "
            "enable_softmax on, the gate must be trained anew"
        )
    return problems


def write_xlora(files: MixtureFiles, layers: list[str], part: Path, target: Path) -> None:
    """Write a mixture to the folder `part`, which will become `target`."""
    trained = files.config.use_trainable_adapters
    for adapter in files.adapters:
        copy_expert(adapter, part / (TRAINED_ADAPTERS if trained else "") / adapter.name)
    save_tensors(original_gate(files, stride=3), part / ORIGINAL_GATE)
    base = lasting_name(files.config.base_model_name_or_path) or ""
    write_json(part / ORIGINAL_CONFIG, original_config(files) | {"base_model_id": base})


def original_config(files: MixtureFiles) -> dict[str, Any]:
    """The options under the original library's names."""
    config = files.config
    own = {
        "adapters": list(config.adapters or {}),
        "base_model_id": config.base_model_name_or_path or "",
        "enable_relu_and_dropout": True,
        "use_bias": True,
    }
    return {name: getattr(config, name) for name in SHARED_OPTIONS} | own


def original_gate(files: MixtureFiles, stride: int) -> dict[str, Tensor]:
    """The gate under the original library's keys; `stride` is the difference of two linear layers' indices."""
    *inner, last = files.linear_layers()
    named = {f"inner.{number * stride}": layer for number, layer in enumerate(inner)} | {"last": last}
    return {
        f"{name}.{part}": t for name, layer in named.items() for part, t in zip(("weight", "bias"), layer, strict=True)
    }

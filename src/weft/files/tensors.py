"""Tensors in safetensors files: read whole, once, or named as broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import CheckpointError, first_line
from weft.files.reading import reason, require_file

# As peft names the two files of a saved adapter.
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
SHOWN = 8  # keys in one message
# What has been read, by file, until it is used.
Opened = dict[Path, dict[str, Tensor]]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file.

    Raises:
        CheckpointError: there is no such file, it is truncated or no safetensors file, or it holds NaN or infinity.
    """
    require_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
        broken = not_finite(tensors)
    except PermissionError as err:
        raise CheckpointError(f"{file} cannot be read: {reason(err)}") from err
    # Of number formats that this version of torch does not know, or cannot look into, it raises what it happens to.
    except (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError) as err:
        raise CheckpointError(f"{file} is no whole safetensors file ({first_line(err)}): copy it again") from err
    if broken:
        raise CheckpointError(
            f"{file} is broken, as {broken}: no token could be computed with it. Save it again from a training that "
            "did not diverge"
        )
    return tensors


def taken(file: Path, opened: Opened | None) -> dict[str, Tensor]:
    """All tensors of a safetensors file: taken out of what has been read already, or else read now.

    Raises:
        CheckpointError: as `read_tensors`.
    """
    return opened.pop(file) if opened and file in opened else read_tensors(file)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Which of these tensors hold NaN or infinity, as words for a message; None where none does."""
    kinds = [
        f"{key} holds {'NaN' if value.isnan().any() else 'infinite numbers'}"
        for key, value in ((key, _comparable(tensor)) for key, tensor in sorted(tensors.items()))
        if value.is_floating_point() and not value.isfinite().all()
    ]
    return preview(kinds) if kinds else None


def _comparable(value: Tensor) -> Tensor:
    return (
        value.float() if value.is_floating_point() and value.itemsize == 1 else value
    )  # torch has no isnan for float8


def preview(keys: Sequence[str]) -> str:
    """The first of these, and how many more there are."""
    shown = ", ".join(keys[:SHOWN])
    return shown if len(keys) <= SHOWN else f"{shown}, and {len(keys) - SHOWN} more"

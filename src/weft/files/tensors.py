"""Reading and checking safetensors files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import CheckpointError, OutOfMemoryError, first_line, lack_of_memory
from weft.files.reading import reason, require_file

# peft's names for the two files of a saved adapter.
CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
SHOWN = 8  # keys in one message
# For dtypes that this version of torch does not know, safetensors and torch raise various errors.
_RAISED = (SafetensorError, OSError, ValueError, RuntimeError, LookupError, AttributeError, TypeError, MemoryError)
# file -> tensors that were read already. `taken` removes an entry.
Opened = dict[Path, dict[str, Tensor]]


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file, or holds NaN or infinite values.
        OutOfMemoryError: there is not enough memory for its tensors.
    """
    require_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
        broken = not_finite(tensors)
    except PermissionError as err:
        raise CheckpointError(f"{file} cannot be read: {reason(err)}") from err
    except _RAISED as err:
        if lack_of_memory(err) is not None:
            size = f"{file.stat().st_size:,} bytes"
            raise OutOfMemoryError(f"{file} ({size}) cannot be read: {first_line(err)}") from err
        raise CheckpointError(f"{file} is no whole safetensors file ({first_line(err)}): copy it again") from err
    if broken:
        raise CheckpointError(
            f"{file} is broken, as {broken}: no token could be computed with it. Save it again from a training that "
            "did not diverge"
        )
    return tensors


def taken(file: Path, opened: Opened | None) -> dict[str, Tensor]:
    """All tensors of a safetensors file: removed from `opened` if they are there, or else read now.

    Raises:
        CheckpointError: as in `read_tensors`.
    """
    return opened.pop(file) if opened and file in opened else read_tensors(file)


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The tensors that hold NaN or infinite values, as text for a message; None if all are finite."""
    kinds = [
        f"{key} holds {'NaN' if value.isnan().any() else 'infinite numbers'}"
        for key, value in ((key, _comparable(tensor)) for key, tensor in sorted(tensors.items()))
        if value.is_floating_point() and not value.isfinite().all()
    ]
    return preview(kinds) if kinds else None


def _comparable(value: Tensor) -> Tensor:
    # torch has no isnan for float8.
    return value.float() if value.is_floating_point() and value.itemsize == 1 else value


def preview(keys: Sequence[str], most: int = SHOWN) -> str:
    """The first of these keys, and the number of the others."""
    shown = ", ".join(keys[:most])
    return shown if len(keys) <= most else f"{shown}, and {len(keys) - most} more"

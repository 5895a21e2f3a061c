"""The attention mask of the gate's positions, from the attention mask of a call.

The mask of a text has a column for each token, including cached tokens, so the gate's positions are its last columns.
The mask of a sound has a column for each input sample or frame, of which the model's convolutions make fewer positions.
There the model itself computes the mask of the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

# transformers' methods for the mask or the lengths after a model's convolutions.
_MASK, _OTHER_MASK, _LENGTHS = (
    "_get_feature_vector_attention_mask",
    "_get_output_attention_mask",
    "_get_feat_extract_output_lengths",
)


def padding_of(
    model: nn.Module, arguments: dict[str, Any], positions: int, device: torch.device
) -> Shaped[Tensor, "batch total"] | None:
    """The mask whose last columns are for the gate's positions; None if the call has no mask `[batch, total]`.

    Args:
        model: the model that was called with `arguments`.
        arguments: the arguments of the call, by name.
        positions: number of positions that the gate reads.
        device: device of the result.

    Raises:
        ValueError: the mask is for samples or frames, and the model has no method to convert it.
    """
    mask = arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    reads_text = any(isinstance(arguments.get(name), Tensor) for name in ("input_ids", "inputs_embeds"))
    if not reads_text and mask.shape[1] != positions:
        mask = _behind_convolutions(model, mask, positions)
    return mask.to(device)


def _behind_convolutions(model: nn.Module, mask: Tensor, positions: int) -> Tensor:
    for module in model.modules():
        if hasattr(module, _MASK):
            return getattr(module, _MASK)(positions, mask)
        if hasattr(module, _OTHER_MASK):
            return getattr(module, _OTHER_MASK)(mask, target_length=positions)
        if hasattr(module, _LENGTHS):
            lengths = getattr(module, _LENGTHS)(mask.sum(-1).long())
            lengths = lengths[-1] if isinstance(lengths, tuple) else lengths  # a tuple: (before, after) pooling
            return torch.arange(positions, device=mask.device) < lengths[:, None]
    raise ValueError(
        f"attention_mask has {mask.shape[1]} columns for the {positions} positions that the gate reads, and "
        f"{type(model).__name__} does not tell which of them are padding: leave attention_mask out"
    )

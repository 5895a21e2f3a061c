"""Which of the gate's positions hold something, by the attention mask of a call.

A mask of text has a column for each token, cached ones included, so the gate's positions are its last columns. A mask
of sound has one for each sample or frame that goes in, and a model's convolutions make fewer positions of them: the
model itself says which.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

# transformers' ways to tell which positions are padding behind a model's convolutions.
_MASK, _OTHER_MASK, _LENGTHS = (
    "_get_feature_vector_attention_mask",
    "_get_output_attention_mask",
    "_get_feat_extract_output_lengths",
)


def padding_of(
    model: nn.Module, arguments: dict[str, Any], positions: int, device: torch.device
) -> Shaped[Tensor, "batch total"] | None:
    """The mask whose last columns are those of the gate's positions; None where the call has none.

    Args:
        model: what was called with `arguments`.
        arguments: of the call, by name.
        positions: how many the gate reads.
        device: for the mask.

    Raises:
        ValueError: the mask is of samples or frames, and the model does not tell which positions they make.
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
            lengths = lengths[-1] if isinstance(lengths, tuple) else lengths  # some give those before pooling too
            return torch.arange(positions, device=mask.device) < lengths[:, None]
    raise ValueError(
        f"attention_mask has {mask.shape[1]} columns for the {positions} positions that the gate reads, and "
        f"{type(model).__name__} does not tell which of them are padding: leave attention_mask out"
    )

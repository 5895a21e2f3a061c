"""The mixture of experts around a linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weft.experts import Stack, Storage, StorageLayout, as_it_is, transposed
from weft.layers.base import XLoraLayer, add_product

# A: [rank, in], B: [out, rank].
_LAYOUT = StorageLayout(
    down=Storage("lora_A", to_rows=as_it_is, from_rows=as_it_is),
    up=Storage("lora_B", to_rows=transposed, from_rows=transposed),
)


class XLoraLinearLayer(XLoraLayer):
    """X-LoRA around peft's `lora.Linear` (which also wraps transformers' `Conv1D`)."""

    layout = _LAYOUT

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        return add_product(result, h, up)

"""The mixture of experts around a linear layer."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from weft.kernels.reference import add_chosen, add_mixture, add_product
from weft.layers.base import XLoraLayer
from weft.layers.carrier import ReadyWeights
from weft.layers.experts import Stack, Storage, StorageLayout, as_it_is, transposed

# A: [rank, in], B: [out, rank].
_LAYOUT = StorageLayout(
    down=Storage("lora_A", to_rows=as_it_is, from_rows=as_it_is),
    up=Storage("lora_B", to_rows=transposed, from_rows=transposed),
)


class XLoraLinearLayer(XLoraLayer):
    """The mixture around peft's `lora.Linear`, which also wraps transformers' `Conv1D`, and its quantised versions.

    See `XLoraLayer` for equation, arguments, errors and an example.
    """

    layout = _LAYOUT

    def add_ready(self, result: Tensor, x: Tensor, stack: Stack, ready: ReadyWeights) -> Tensor | None:
        # This runs in every layer for every decoded token, so it avoids even unneeded views.
        if self.target.training or x.dim() != 3:  # dropout, or an input without a sequence axis
            return None
        *tokens, width = x.shape
        if ready.tokens is not None and ready.tokens != (*tokens,):
            return None
        down, up = stack.down, stack.up
        if x.dtype != down.dtype:
            x = x.to(down.dtype)
        index = self.layer_number - ready.first_layer
        weights = ready.weights[index]
        if weights.dtype != x.dtype:
            weights = weights.to(x.dtype)
        rows, base = x.reshape(-1, width), result.reshape(-1, result.shape[2])
        if ready.chosen is not None:
            rows = add_chosen(base, rows, down, up, weights, ready.chosen[index])
        else:
            left_out = None if ready.left_out is None else ready.left_out[index]
            rows = add_mixture(base, rows, down, up, weights, left_out)
        return rows.view(*tokens, -1)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        return add_product(result, h, up)

    def base_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.target.fan_in_fan_out else weight

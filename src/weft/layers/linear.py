"""The mixture of experts around a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from weft.carrier import ReadyWeights
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

    def add_ready(self, result: Tensor, x: Tensor, stack: Stack, ready: ReadyWeights) -> Tensor | None:
        if self.target.training or x.dim() != 3:  # dropout, or something else than the sequence
            return None
        x = x.to(stack.down.dtype)
        if ready.chosen is not None:
            place = self.layer_number - ready.first_layer
            return self._add_chosen(result, x, stack, ready.kept[place], ready.chosen[place])
        weights = ready.per_rank[self.layer_number]
        if weights.shape[0] not in (1, x.shape[0]) or weights.shape[1] not in (1, x.shape[1]):
            return None
        return add_product(result, F.linear(x, stack.down) * weights.to(x.dtype), stack.up)

    @staticmethod
    def _add_chosen(
        result: Float[Tensor, "batch seq out"],
        x: Float[Tensor, "batch seq in"],
        stack: Stack,
        kept: Float[Tensor, "tokens top_k 1"],
        experts: Int[Tensor, " chosen"],
    ) -> Tensor | None:
        tokens, top_k, _ = kept.shape
        batch, seq, width = x.shape
        if batch * seq != tokens:
            return None
        num_experts, rank = len(stack.ranks), stack.ranks[0]
        down = stack.down.view(num_experts, rank * width).index_select(0, experts).view(tokens, top_k * rank, width)
        up = stack.up.view(num_experts, -1).index_select(0, experts).view(tokens, top_k * rank, -1)
        if tokens == 1:
            h = F.linear(x, down[0]).view(1, top_k, rank) * kept.to(x.dtype)
            return add_product(result, h.view(1, 1, top_k * rank), up[0])
        h = torch.bmm(down, x.reshape(tokens, width, 1)).view(tokens, top_k, rank) * kept.to(x.dtype)
        flat = result.reshape(tokens, 1, -1)
        h = h.view(tokens, 1, top_k * rank)
        return (torch.baddbmm(flat, h, up) if flat.dtype == h.dtype else flat + torch.bmm(h, up)).view(result.shape)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        return add_product(result, h, up)

    def base_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.target.fan_in_fan_out else weight

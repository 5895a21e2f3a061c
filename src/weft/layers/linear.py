"""The mixture of experts around a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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

    def can_gather(self, x: Tensor, stack: Stack, kept: Tensor) -> bool:
        alike = stack.rank_expert is None and stack.column_index is None and not (stack.biased or stack.dora)
        same_dtype = x.dtype == stack.down.dtype and not torch.is_autocast_enabled(x.device.type)
        return alike and same_dtype and x.shape[:-1] == kept.shape[:-1]

    def add_chosen(
        self,
        result: Float[Tensor, "batch seq out"],
        x: Float[Tensor, "batch seq in"],
        stack: Stack,
        kept: Float[Tensor, "batch seq top_k"],
        experts: Int[Tensor, "batch seq top_k"],
    ) -> Tensor:
        batch, seq, top_k = kept.shape
        tokens, num_experts, rank = batch * seq, len(stack.ranks), stack.ranks[0]
        experts = experts.reshape(-1).to(x.device)
        scales = kept.reshape(-1).to(x.device, x.dtype) * stack.scales.to(x.dtype).index_select(0, experts)
        scales = (scales * self.config.global_scaling_weight).view(tokens, top_k, 1)
        down = stack.down.view(num_experts, rank, -1).index_select(0, experts).view(tokens, top_k * rank, -1)
        up = stack.up.view(num_experts, rank, -1).index_select(0, experts).view(tokens, top_k * rank, -1)
        h = torch.bmm(down, x.reshape(tokens, -1, 1))  # [tokens, top_k * rank, 1]
        h = (h.view(tokens, top_k, rank) * scales).view(tokens, 1, top_k * rank)
        flat = result.reshape(tokens, 1, -1)
        return (torch.baddbmm(flat, h, up) if flat.dtype == h.dtype else flat + torch.bmm(h, up)).view(result.shape)

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        return add_product(result, h, up)

    def base_rows(self, weight: Tensor) -> Tensor:
        return weight.T if self.target.fan_in_fan_out else weight

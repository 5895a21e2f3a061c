"""The mixture of experts around a two-dimensional convolution.

`[batch, channel, height, width]` has no token axis, so scalings over tokens need a meaning here: one position per
sample scales that sample; one position per output cell (perhaps after leading class or register tokens, which are left
out) scales the experts' contribution at that cell; anything else counts as its mean over each sample's unpadded tokens.
The scalings act between A and B; B is a 1x1 convolution, so cells stay apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.layers.base import XLoraLayer
from weft.layers.experts import Stack, Storage, StorageLayout, as_it_is


def _from_1x1(weight: Tensor) -> Tensor:
    return weight[:, :, 0, 0].T


def _to_1x1(rows: Tensor) -> Tensor:
    return rows.T[:, :, None, None]


# A: [rank, in, height, width], B: [out, rank / groups, 1, 1].
_LAYOUT = StorageLayout(
    down=Storage("lora_A", to_rows=as_it_is, from_rows=as_it_is),
    up=Storage("lora_B", to_rows=_from_1x1, from_rows=_to_1x1),
)


class XLoraConv2dLayer(XLoraLayer):
    """X-LoRA around peft's `lora.Conv2d`."""

    layout = _LAYOUT
    channel_axis = 1

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        # peft's A has the base layer's stride and padding, but neither its dilation nor its groups.
        base = self.target.get_base_layer()
        return F.conv2d(x, weight, stride=base.stride, padding=base.padding)  # [batch, rank, height, width]

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        groups = self.target.get_base_layer().groups
        if groups > 1:
            h = h.index_select(1, _group_major(stack.ranks, groups, h.device))
        return result + F.conv2d(h, _to_1x1(up), groups=groups)

    def base_rows(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)


def _group_major(ranks: tuple[int, ...], groups: int, device: torch.device) -> Tensor:
    """Order that turns rank channels sorted by expert into channels sorted by group, then expert."""
    blocks = torch.arange(sum(ranks), device=device).split(ranks)
    return torch.cat([block.chunk(groups)[group] for group in range(groups) for block in blocks])

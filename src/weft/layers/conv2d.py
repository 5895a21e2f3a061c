"""The mixture of experts around a two-dimensional convolution.

The input `[batch, channel, height, width]` has no token axis. Scalings of tokens are used in this way:

- one position per sample: for all cells of the sample;
- one position per output cell, perhaps after class or register tokens, which are dropped: for this cell;
- anything else: the mean over each sample's tokens, without padding.

The scalings are applied between A and B. B is a 1x1 convolution, so they act on each cell separately.
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
    """The mixture around peft's `lora.Conv2d`. See `XLoraLayer` for equation, arguments and errors.

    Example:
        >>> target = LoraModel(nn.Sequential(nn.Conv2d(3, 8, 2)), LoraConfig(target_modules=["0"]), "a").model[0]
        >>> config = XLoraConfig(adapters={"a": "adapters/a"})
        >>> layer = XLoraConv2dLayer(None, target, target.forward, layer_number=0, config=config)
        >>> layer.forward(torch.randn(1, 3, 6, 6), scalings=torch.ones(1, 1, 1, 1)).shape
        torch.Size([1, 8, 5, 5])
    """

    layout = _LAYOUT
    channel_axis = 1

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        # peft's A has the base layer's stride and padding, but not its dilation and groups.
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
    """The index that reorders rank channels from expert-major to group-major order."""
    blocks = torch.arange(sum(ranks), device=device).split(ranks)
    return torch.cat([block.chunk(groups)[group] for group in range(groups) for block in blocks])

"""The mixture of experts around an embedding. A lookup replaces the product A x."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.reference import add_product
from weft.layers.base import XLoraLayer
from weft.layers.experts import Stack, Storage, StorageLayout, as_it_is, transposed

# A: [rank, vocabulary], B: [out, rank], both plain parameters.
_LAYOUT = StorageLayout(
    down=Storage("lora_embedding_A", to_rows=as_it_is, from_rows=as_it_is),
    up=Storage("lora_embedding_B", to_rows=transposed, from_rows=transposed),
)


class XLoraEmbeddingLayer(XLoraLayer):
    """The mixture around peft's `lora.Embedding`. See `XLoraLayer` for equation, arguments and errors.

    The scalings are applied after the lookup. If the base layer multiplies its output by an `embed_scale` (Gemma), the
    experts' output is multiplied too. As in peft, there is no dropout on token ids.

    Example:
        >>> target = LoraModel(nn.Sequential(nn.Embedding(9, 16)), LoraConfig(target_modules=["0"]), "a").model[0]
        >>> config = XLoraConfig(adapters={"a": "adapters/a"})
        >>> layer = XLoraEmbeddingLayer(None, target, target.forward, layer_number=0, config=config)
        >>> layer.forward(torch.tensor([[1, 2, 3]]), scalings=torch.ones(1, 3, 1, 1)).shape
        torch.Size([1, 3, 16])
    """

    layout = _LAYOUT

    def output_dtype(self, x: Tensor, result: Tensor) -> torch.dtype:
        return result.dtype

    def prepare_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x

    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        base = self.target.get_base_layer()
        return F.embedding(x, weight.T, padding_idx=base.padding_idx)  # [batch, seq, rank]

    def dropped_inputs(self, x: Tensor, stack: Stack) -> list[Tensor] | None:
        return None

    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        embed_scale = self.target._get_embed_scale()
        if embed_scale is not None:
            h = h * embed_scale.to(h.dtype)
        return add_product(result, h, up)

    def base_rows(self, weight: Tensor) -> Tensor:
        return weight.T

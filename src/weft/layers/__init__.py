"""The layers that mix the experts: one class per kind of LoRA layer, over one shared mixture."""

from weft.layers.base import XLoraLayer
from weft.layers.conv2d import XLoraConv2dLayer
from weft.layers.embedding import XLoraEmbeddingLayer
from weft.layers.linear import XLoraLinearLayer

__all__ = ["XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer"]

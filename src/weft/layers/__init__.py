"""The layers that mix the experts: one class per kind of LoRA layer, over one shared base class.

Knows one layer at a time, and not where its scalings come from. The arithmetic is in `weft.kernels`.

    base.py             what all kinds share: dtypes, dropout, biases, which scalings act on what
    linear.py, embedding.py, conv2d.py: what A and B are there
    dora.py             what the magnitudes of DoRA experts do to a mixture
    experts.py          a layer's experts, stacked; the stack is their storage
    convert.py          peft's LoRA layers become such layers, or are refused by their class's name
    carrier.py          brings a call's scalings to the layers
    decode_weights.py   every layer's rank weights for short inputs, computed at once
    inputs.py           which of the text's tokens each layer of a base model sees
"""

from weft.layers.base import XLoraLayer
from weft.layers.conv2d import XLoraConv2dLayer
from weft.layers.embedding import XLoraEmbeddingLayer
from weft.layers.linear import XLoraLinearLayer

__all__ = ["XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer"]

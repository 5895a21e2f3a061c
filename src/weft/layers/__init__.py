"""The layers that mix the experts: one class for each kind of LoRA layer, with a shared base class.

This is about single layers; the scalings come from `passes`. The arithmetic is in `weft.kernels`.

    base.py             shared by all kinds: dtypes, dropout, biases, alignment of scalings with the input
    linear.py, embedding.py, conv2d.py: the products with A and B for each kind
    dora.py             the factors of DoRA experts
    experts.py          a layer's experts as stacked tensors, which hold the parameters
    convert.py          converts peft's LoRA layers, or refuses unknown classes
    carrier.py          passes the scalings of a call to the layers
    decode_weights.py   the rank weights of all layers for short inputs, computed once per call
    inputs.py           how the input of each LoRA layer relates to the tokens
"""

from weft.layers.base import XLoraLayer
from weft.layers.conv2d import XLoraConv2dLayer
from weft.layers.embedding import XLoraEmbeddingLayer
from weft.layers.linear import XLoraLinearLayer

__all__ = ["XLoraConv2dLayer", "XLoraEmbeddingLayer", "XLoraLayer", "XLoraLinearLayer"]

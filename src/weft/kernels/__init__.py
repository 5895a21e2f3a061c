"""The mixture of experts as pure functions over tensors.

The input is a layer's input, the stacked experts and their weights; the result is the layer's output. There are no
layers, models or options here.

    reference.py        the mixture in torch's own operations

A faster kernel goes into a file of its own and is tested against the reference.
"""

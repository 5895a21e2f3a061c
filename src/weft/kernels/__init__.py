"""The mixture of experts as pure functions over tensors.

Knows no layers, no models and no options: weights and stacked experts go in, a layer's output comes out.

    reference.py        the mixture in torch's own operations

Faster kernels come as files of their own beside it, each tested against the reference.
"""

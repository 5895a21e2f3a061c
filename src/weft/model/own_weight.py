"""Experts as they were trained: at constant weights that the mixture's own weight leaves alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def at_own_weight(model: Any, weights: Mapping[str, float]) -> Iterator[None]:
    """In this block a mixture follows these weights in all layers, at a `global_scaling_weight` of 1.

    `fixed_scalings` alone takes the place of the gate, and the mixture's own weight multiplies what it gives.

    Args:
        model: a mixture.
        weights: expert name -> weight; one expert at 1 is that adapter alone.
    """
    before = model.get_global_scaling_weight()
    model.set_global_scaling_weight(1.0)
    try:
        with model.fixed_scalings(weights):
            yield
    finally:
        model.set_global_scaling_weight(before)

"""Hidden states in, one scaling per token, LoRA layer and expert out.

Knows neither the base model that gives the hidden states nor the layers that follow the scalings.

    classifier.py   the gate: an MLP and the head that gives scalings
    routing.py      the mathematics of routing as pure functions: softmax, top-k, means over tokens
    losses.py       the gate's own losses as pure functions
    metrics.py      who is used, how sharply, and whether the gate collapses
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.gate.classifier import XLoraClassifier as XLoraClassifier

__all__ = ["XLoraClassifier"]

__getattr__, __dir__ = lazily(__name__, {"XLoraClassifier": "weft.gate.classifier"})

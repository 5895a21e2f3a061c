"""The gate: it computes one scaling per token, LoRA layer and expert from hidden states.

The base model and the LoRA layers are not used here.

    classifier.py   the gate: an MLP whose outputs are the scalings
    scaling_lora.py the LoRA of its own that it can have in the scaling pass
    routing.py      softmax, top-k, means over tokens and alignment, as pure functions
    losses.py       the gate's losses as pure functions
    metrics.py      use of the experts, entropy and collapse during training
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.gate.classifier import XLoraClassifier as XLoraClassifier

__all__ = ["XLoraClassifier"]

__getattr__, __dir__ = lazily(__name__, {"XLoraClassifier": "weft.gate.classifier"})

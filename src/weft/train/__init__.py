"""The recipe: data in, a trained mixture out, on transformers' Trainer.

Knows no screen but a line of progress, and no command.

    gate.py                 `weft train`: the gate (and, if asked, the experts)
    experts.py              two stages: the experts first, then the gate
    start.py                from a mixture, or with a gate that is fitted
    gate_fit.py             a gate fitted to say which expert fits each token
    arguments.py            options -> transformers' TrainingArguments
    packing_check.py        whether a model keeps the texts of a packed row apart
    trainer.py              the Trainer: the batches of one process in several, one folder at the end
    finite.py               stops at a loss that is not finite
    callbacks.py            the gate in a Trainer's log
    progress.py             trained tokens, a budget of them, the line on the screen
    checkpoints.py          which checkpoints are whole
    whole_checkpoints.py    none is half-written
    scaling_cache.py        the scaling pass of all texts, computed once
    scaling_index.py        what its files hold
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.train.experts import train_experts as train_experts
    from weft.train.experts import train_in_stages as train_in_stages
    from weft.train.gate import train as train

__all__ = ["train", "train_experts", "train_in_stages"]

__getattr__, __dir__ = lazily(
    __name__,
    {"train": "weft.train.gate", "train_experts": "weft.train.experts", "train_in_stages": "weft.train.experts"},
)

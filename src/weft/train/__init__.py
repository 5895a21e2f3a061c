"""Training of mixtures and experts, on transformers' Trainer.

Nothing is printed here but progress and notices.

    gate.py             trains the gate (and, if asked, the experts)
    experts.py          two stages: trains the experts first, then the gate
    checks.py           checks of the options that read checkpoints, mixtures or the Hub
    dry_run.py          estimates the memory and time of a training
    packing_check.py    checks that a model separates the texts of a packed row
    arguments.py        options -> transformers' TrainingArguments, steps, a mixture's options
    start.py            starts from a mixture, with a fitted gate, or from a checkpoint
    gate_fit.py         fits the gate to predict each token's expert, before training
    gate_targets.py     what that fit learns from: hidden states, and shares from labels or losses
    scaling_fit.py      trains the gate's own LoRA in the scaling pass, before that fit
    trainer.py          a subclass of transformers' Trainer
    finite_loss.py      stops at a loss that is not finite, with the last good weights
    sharding.py         weights and the optimizer's state between shards and files
    checkpoints.py      finds complete checkpoints, removes old ones
    run_record.py       records the options and data of a run; changes of a run that resumes
    callbacks.py        adds metrics of the gate to a Trainer's log
    reports.py          checks the tools that receive the log
    held_out.py         draws the texts that are held out of a training's data
    plateau.py          training until the loss on held-out texts stops falling
    weight_search.py    chooses the weight of the mixture on held-out texts
    comparison.py       compares the trained mixture with its experts on held-out texts
    stopping.py         ends a training early: Ctrl-C, a budget of tokens
    progress.py         progress on the screen
    scaling_cache.py    computes the scaling pass of all texts once and keeps it on disk
    scaling_index.py    the index of such a cache
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

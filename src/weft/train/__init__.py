"""The recipe: data in, a trained mixture out, on transformers' Trainer.

Knows no screen but a line of progress, and no command.

    gate.py             `weft train`: the gate (and, if asked, the experts)
    experts.py          two stages: the experts first, then the gate
    checks.py           what is wrong with the options, as checkpoints, mixtures and the Hub tell
    dry_run.py          what a training needs, told by a step
    packing_check.py    whether a model keeps the texts of a packed row apart
    arguments.py        options -> transformers' TrainingArguments, steps, a mixture's options
    start.py            from a mixture, with a fitted gate, or from a checkpoint
    gate_fit.py         a gate fitted to say which expert fits each token
    trainer.py          the Trainer: all that weft overrides of transformers' one
    finite_loss.py      a loss that is not finite: the last good weights, and what to say
    sharding.py         weights and the optimizer's state between shards and files
    checkpoints.py      which checkpoints are whole, and which are kept
    run_record.py       what a run is trained with, and what a run that resumes has changed
    callbacks.py        the gate in a Trainer's log
    reports.py          the tools that the log goes to
    plateau.py          training until the loss on held-out texts stops falling
    weight_search.py    the weight of the mixture, chosen on held-out texts
    comparison.py       the trained mixture beside its experts, on held-out texts
    stopping.py         what ends a training early: Ctrl-C, a budget of tokens
    progress.py         what the screen shows
    scaling_cache.py    the scaling pass of all texts, computed once
    scaling_index.py    what its files hold
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

"""Chooses `global_scaling_weight` while the gate is trained: by the loss on held-out texts, a step at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import TrainerCallback

from weft.distributed import from_all_processes
from weft.files.reading import read_json
from weft.train.held_out import some_of
from weft.train.run_record import evaluations

_FACTOR = 1.2  # between two weights
_LEAST, _MOST = 0.5, 4.0
_SEQUENCES = 16  # of the held-out ones
# A step away from a weight of 1 must lower the loss by this fraction: it costs more on texts of a single domain, and on
# texts that no expert knows (benchmarks/results/2026-11-27-domains-fit.md). With eight experts a step to 1.2 lowers it
# by 0.4 to 0.5%, and improves single domains too (2026-11-28-domains-own-lora.md).
_LEAST_GAIN = 0.0025
_NAME = "global_scaling_weight"


class WeightSearch(TrainerCallback):
    """Before the first step and each evaluation, tries the next larger and smaller weight, and takes the best of three.

    The best weight w has the lowest loss times (1 + 0.0025 |ln w / ln 1.2|): being a step further from 1 must lower
    the loss by 0.25%. The weight is logged when it changes. Each checkpoint has it in its config, from which
    `restore_weight` takes it.

    Args:
        trainer: the Trainer, which this is to be added to.
        model: the mixture.
        held_out: the sequences to evaluate on, of which 16 are used.
    """

    def __init__(self, trainer: Any, model: Any, held_out: list[dict[str, Any]]) -> None:
        self._trainer, self._model = trainer, model
        self._some: Any = some_of(held_out, _SEQUENCES)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try the weights with the gate as it was fitted, unless a training is resumed or has ended."""
        begins = state.global_step == 0 and not evaluations(state.log_history)
        if begins and not control.should_training_stop:
            self._search()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try the weights before an evaluation."""
        if control.should_evaluate:
            self._search()

    def _search(self) -> None:
        own = self._model.get_global_scaling_weight()
        tried = {own: self._loss(own)}
        try:
            for weight in (own * _FACTOR, own / _FACTOR):
                if _LEAST <= weight <= _MOST:
                    tried[weight] = self._loss(weight)
        finally:
            self._model.set_global_scaling_weight(own)  # an interrupted training saves the model as it is
        # One process decides for all, whose sums may differ in the last digit.
        best = from_all_processes(min(tried, key=lambda weight: _known(tried[weight]) * _price(weight)))[0]
        self._model.set_global_scaling_weight(best)
        if best != own:
            self._trainer.log({_NAME: best})

    def _loss(self, weight: float) -> float:
        self._model.set_global_scaling_weight(weight)
        trainer = self._trainer
        loop = trainer.evaluation_loop(trainer.get_eval_dataloader(self._some), "weights", prediction_loss_only=True)
        assert loop.metrics is not None
        return float(loop.metrics["eval_loss"])


def cost(num_held_out: int) -> float:
    """The time of the trials before an evaluation, as a multiple of the evaluation's."""
    return 3 * min(_SEQUENCES, num_held_out) / num_held_out


def restore_weight(model: Any, checkpoint: Path) -> None:
    """Give a mixture the `global_scaling_weight` of a checkpoint, whose gate it has or will have."""
    model.set_global_scaling_weight(read_json(checkpoint / CONFIG_NAME).get(_NAME, 1.0))


def _price(weight: float) -> float:
    return 1 + _LEAST_GAIN * abs(math.log(weight) / math.log(_FACTOR))


def _known(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss

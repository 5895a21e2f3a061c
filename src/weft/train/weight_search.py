"""Chooses `global_scaling_weight` while the gate is trained: by the loss on held-out texts, a step at a time."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from weft.distributed import from_all_processes

_FACTOR = 1.2  # between two weights
_LEAST, _MOST = 0.5, 4.0
_SEQUENCES = 16  # of the held-out ones
_NAME = "global_scaling_weight"
WEIGHT_LOGGED = f'"{_NAME}":'  # in the log of a run that chooses it


class WeightSearch(TrainerCallback):
    """Before each evaluation, tries the next larger and the next smaller weight, and takes the best of the three.

    The weight is logged when it changes. A resumed run, and the best checkpoint, get the weight that the log has for
    their step.

    Args:
        trainer: the Trainer, which this is to be added to.
        model: the mixture.
        held_out: the sequences to evaluate on, of which the first 16 are used.
    """

    def __init__(self, trainer: Any, model: Any, held_out: list[dict[str, Any]]) -> None:
        self._trainer, self._model = trainer, model
        self._some: Any = held_out[:_SEQUENCES]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log the first weight, or continue with that of the run that is resumed."""
        if state.global_step == 0:
            state.log_history.append({_NAME: self._model.get_global_scaling_weight(), "step": 0})
        self._use_weight_at(state, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Try the weights."""
        if not control.should_evaluate:
            return
        own = self._model.get_global_scaling_weight()
        tried = {own: self._loss(own)}
        for weight in (own * _FACTOR, own / _FACTOR):
            if _LEAST <= weight <= _MOST:
                tried[weight] = self._loss(weight)
        # One process decides for all, whose sums may differ in the last digit.
        best = from_all_processes(min(tried, key=lambda weight: _known(tried[weight])))[0]
        self._model.set_global_scaling_weight(best)
        if best != own:
            self._trainer.log({_NAME: round(best, 3)})
            state.log_history[-1][_NAME] = best

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Return to the weight of the best checkpoint, whose gate has been loaded."""
        if state.best_global_step is not None and args.load_best_model_at_end:
            self._use_weight_at(state, state.best_global_step)

    def _use_weight_at(self, state: Any, step: int) -> None:
        logged = [entry[_NAME] for entry in state.log_history if _NAME in entry and entry["step"] <= step]
        if logged:
            self._model.set_global_scaling_weight(logged[-1])

    def _loss(self, weight: float) -> float:
        self._model.set_global_scaling_weight(weight)
        trainer = self._trainer
        loop = trainer.evaluation_loop(trainer.get_eval_dataloader(self._some), "weights", prediction_loss_only=True)
        assert loop.metrics is not None
        return float(loop.metrics["eval_loss"])


def _known(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss

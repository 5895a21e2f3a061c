"""A training without a number of steps: until the loss on held-out texts stops falling.

An evaluation *fails* if its loss is not at least 0.1% below the lowest one before it. After each failure the learning
rate is multiplied by 0.3. The training ends with the fourth failure, and the checkpoint with the lowest loss is loaded.

    rate = peak * min(1, step / warmup) * 0.3^failures

The number of failures is a function of the losses so far, which a checkpoint has. So a resumed run continues the rule.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from weft.distributed import number_of_processes
from weft.options import TrainOptions

_Rows = list[dict[str, Any]]

_LEAST_FALL = 0.001
_FACTOR = 0.3
_FAILURES = 4  # with which the training ends
_PEAK = 5e-3  # the first learning rate, if the options give none
_HELD_OUT, _MOST_HELD_OUT, _LEAST_HELD_OUT = 0.1, 64, 4  # of the sequences
# An evaluation takes about a fifth of the time of the steps between two: a forward pass is a third of a step. The
# search for the weight comes on top.
_SHARE, _FORWARD, _LEAST_INTERVAL = 0.2, 1 / 3, 10
_EXPECTED_INTERVALS = 8
_MOST_EPOCHS, _MOST_INTERVALS = 10, 40  # whichever is more


class Plan(NamedTuple):
    """How long to train, and on what.

    Attributes:
        options: of the training, with a number of steps.
        rows: to train on.
        held_out: to evaluate on, if any.
        expected_steps: an estimate of the number of steps; None if the training does not end at a plateau.
    """

    options: TrainOptions
    rows: _Rows
    held_out: _Rows | None
    expected_steps: int | None = None


def plan(
    options: TrainOptions, rows: _Rows, held_out: _Rows | None, say: Callable[[str], None] = lambda line: None
) -> Plan:
    """Fill in what the plateau rule needs, if the options give no number of steps.

    Args:
        options: of the training.
        rows: all sequences to train on. Without `held_out`, a tenth of them is held out, at most 64.
        held_out: sequences to evaluate on, if the options name some.
        say: called with a line about what was decided.
    """
    if options.max_steps or options.epochs or options.max_tokens:
        return Plan(options, rows, held_out)
    if held_out is None:
        rows, held_out = split(rows, options.seed)
    if held_out is None:
        needed = round(_LEAST_HELD_OUT / _HELD_OUT)
        say(f"one pass over the data: {len(rows)} sequences, {needed} are needed to hold out some (or eval_data)")
        return Plan(dataclasses.replace(options, epochs=1.0), rows, None)
    per_step = options.batch_size * options.gradient_accumulation_steps * number_of_processes()
    interval = options.eval_steps or interval_of(len(held_out), per_step)
    most = max(_MOST_EPOCHS * math.ceil(len(rows) / per_step), _MOST_INTERVALS * interval)
    say(
        f"training until the loss on {len(held_out)} held-out sequences stops falling, evaluated every {interval} "
        f"steps; at most {most} steps"
    )
    rate = options.learning_rate or _PEAK
    options = dataclasses.replace(options, learning_rate=rate, max_steps=most, eval_steps=interval)
    return Plan(options, rows, held_out, _EXPECTED_INTERVALS * interval)


def split(rows: _Rows, seed: int) -> tuple[_Rows, _Rows | None]:
    """A random tenth of the sequences, at most 64, as the second part; None if it would have fewer than 4."""
    number = min(_MOST_HELD_OUT, int(_HELD_OUT * len(rows)))
    if number < _LEAST_HELD_OUT:
        return rows, None
    chosen = set(random.Random(seed).sample(range(len(rows)), number))
    return [row for at, row in enumerate(rows) if at not in chosen], [rows[at] for at in sorted(chosen)]


def interval_of(num_held_out: int, per_step: int) -> int:
    """Steps between two evaluations."""
    return max(_LEAST_INTERVAL, math.ceil(num_held_out / per_step * _FORWARD / _SHARE))


def failures(losses: Sequence[float]) -> int:
    """The number of evaluations whose loss was not at least 0.1% below the lowest one before it."""
    lowest, failed = math.inf, 0
    for loss in losses:
        if loss < lowest - _LEAST_FALL * abs(lowest) or math.isinf(lowest):
            lowest = loss
        else:
            failed, lowest = failed + 1, min(lowest, loss)
    return failed


class Plateau(TrainerCallback):
    """Reduces the learning rate after each failed evaluation, and ends the training with the fourth.

    Args:
        peak: the learning rate before the first failure.
    """

    def __init__(self, peak: float) -> None:
        self._peak = peak

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Continue with the learning rate of the run that is resumed."""
        self._set_rate(failures(_losses(state)), lr_scheduler, kwargs["optimizer"])

    def on_evaluate(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Reduce the learning rate, or stop."""
        failed = failures(_losses(state))
        self._set_rate(failed, lr_scheduler, kwargs["optimizer"])
        if failed >= _FAILURES:
            control.should_training_stop = True

    def _set_rate(self, failed: int, schedule: Any, optimizer: Any) -> None:
        """Set the rate from which the schedule, a warm-up, computes that of each step."""
        base = self._peak * _FACTOR**failed
        schedule = getattr(schedule, "scheduler", schedule)  # accelerate's wrapper
        rates = [base * share(schedule.last_epoch) for share in schedule.lr_lambdas]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [base] * len(rates), "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _losses(state: Any) -> list[float]:
    return [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]

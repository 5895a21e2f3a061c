"""A training without a number of steps: until the loss on held-out texts stops falling.

An evaluation *fails* if its loss is not at least 0.1% below the lowest one before it. After each failure the learning
rate is multiplied by 0.3. The training ends with the fourth failure, and the checkpoint with the lowest loss is loaded.
This can be the gate before the first step, whose loss does not count for the rule: the first steps at a high rate can
be a way to a lower loss through higher ones.

    rate = peak * min(1, step / warmup) * 0.3^failures

The number of failures is a function of the losses so far, which a checkpoint has. So a resumed run continues the rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from transformers import TrainerCallback

from weft.data.packing import pack
from weft.distributed import number_of_processes
from weft.options import TrainOptions
from weft.train.held_out import LEAST_ROWS, digest_of, digest_of_all, split
from weft.train.run_record import Past, evaluations

_Rows = list[dict[str, Any]]

_LEAST_FALL = 0.001
_FACTOR = 0.3
_FAILURES = 4  # with which the training ends
_PEAK = 5e-3  # the first learning rate, if the options give none
# An evaluation takes about a fifth of the time of the steps between two: a forward pass is a third of a step. The
# search for the weight comes on top.
_SHARE, _FORWARD, _LEAST_INTERVAL = 0.2, 1 / 3, 10
# For the estimate of the time: an evaluation took 0.4 to 0.6 of the time of steps on the same texts, by hand on
# 2026-11-28 on two cores, while the gate alone was trained.
_EVALUATION = 0.5
_EXPECTED_INTERVALS = 8
_MOST_EPOCHS, _MOST_INTERVALS = 10, 40  # whichever is more


class Plan(NamedTuple):
    """How long to train, and on what.

    Attributes:
        options: of the training, with a number of steps.
        rows: to train on.
        held_out: to evaluate on, if any.
        expected_steps: an estimate of the number of steps; None if the training does not end at a plateau.
        drawn: digests of the held-out rows that were drawn from the data.
        since: the step after which losses count for the rule.
        comparable: the losses of the run to resume are of the same held-out rows.
    """

    options: TrainOptions
    rows: _Rows
    held_out: _Rows | None
    expected_steps: int | None = None
    drawn: tuple[str, ...] = ()
    since: int = 0
    comparable: bool = True

    def record(self) -> dict[str, Any]:
        """What a run that resumes needs to know of it."""
        digest = digest_of_all(self.held_out) if self.held_out else None
        return {"digest": digest, "drawn": list(self.drawn), "since": self.since}


def plan(
    options: TrainOptions,
    rows: _Rows,
    held_out: _Rows | None,
    say: Callable[[str], None] = lambda line: None,
    past: Past | None = None,
) -> Plan:
    """Fill in what the plateau rule needs, if the options give no number of steps.

    Args:
        options: of the training.
        rows: all sequences to train on. Without `held_out`, a tenth of them is held out, at most 64.
        held_out: sequences to evaluate on, if the options name some.
        say: called with a line about what was decided.
        past: the run to resume, if any.
    """
    if not options.ends_at_a_plateau:
        return _continued(Plan(options, rows, held_out), past)
    drawn: tuple[str, ...] = ()
    if held_out is None:
        rows, held_out = split(rows, options.seed, past.drawn if past else ())
        drawn = tuple(map(digest_of, held_out or ()))
        if past is not None and held_out is not None and sorted(drawn) != sorted(past.drawn):
            say("the held-out sequences are not those of the run to resume, and it may have trained on them")
    if held_out is None:
        say(f"one pass over the data: {len(rows)} sequences, {LEAST_ROWS} are needed to hold out some (or eval_data)")
        return _continued(Plan(dataclasses.replace(options, epochs=1.0), rows, None), past)
    batches = _steps_per_epoch(options, rows)
    interval = options.eval_steps or interval_of(_tokens(held_out), _tokens(rows) / batches)
    planned = _continued(Plan(options, rows, held_out, drawn=drawn), past)
    most = planned.since + max(_MOST_EPOCHS * batches, _MOST_INTERVALS * interval)
    say(_announced(planned, past, interval, most))
    rate = options.learning_rate or _PEAK
    options = dataclasses.replace(options, learning_rate=rate, max_steps=most, eval_steps=interval)
    return planned._replace(options=options, expected_steps=planned.since + _EXPECTED_INTERVALS * interval)


def _continued(planned: Plan, past: Past | None) -> Plan:
    """A plan whose rule starts anew with other texts, to train on or to evaluate on."""
    if past is None:
        return planned
    comparable = past.digest in (None, planned.record()["digest"])
    return planned._replace(comparable=comparable, since=past.done if past.other_data or not comparable else past.since)


def _announced(planned: Plan, past: Past | None, interval: int, most: int) -> str:
    """What will end the training, or why nothing is left to train."""
    if past is not None:
        ended = failures([loss for step, loss in past.losses if step > planned.since]) >= _FAILURES
        if ended or past.done >= most:
            why = "this run has ended at a plateau" if ended else f"this run has reached its limit of {most} steps"
            return f"no step is left: {why}. Give max_steps, epochs or max_tokens to train further"
    anew = ""
    if past is not None and planned.since != past.since:
        anew = ", with other texts than before and the first learning rate"
    return (
        f"training until the loss on {len(planned.held_out or ())} held-out sequences stops falling, evaluated every "
        f"{interval} steps; at most {most} steps{anew}"
    )


def evaluation_in_steps(planned: Plan) -> float:
    """The estimated time of an evaluation, without trials of the weight, as a number of optimizer steps."""
    options, rows, held_out = planned[:3]
    return _EVALUATION * _tokens(held_out or []) / (_tokens(rows) / _steps_per_epoch(options, rows))


def _steps_per_epoch(options: TrainOptions, rows: _Rows) -> int:
    per_step = options.batch_size * options.gradient_accumulation_steps * number_of_processes()
    lengths = [len(row["input_ids"]) for row in rows]
    return math.ceil((len(pack(lengths, options.sequence_length)) if options.packing else len(rows)) / per_step)


def _tokens(rows: _Rows) -> int:
    return sum(len(row["input_ids"]) for row in rows)


def interval_of(evaluated: int, per_step: float) -> int:
    """Steps between two evaluations, from the tokens of an evaluation and of a step."""
    return max(_LEAST_INTERVAL, math.ceil(evaluated / per_step * _FORWARD / _SHARE))


def failures(losses: Sequence[float]) -> int:
    """The number of evaluations whose loss was not at least 0.1% below the lowest one before it."""
    lowest, failed = math.inf, 0
    for loss in losses:
        if math.isfinite(loss) and (math.isinf(lowest) or loss < lowest - _LEAST_FALL * abs(lowest)):
            lowest = loss
        else:
            failed, lowest = failed + 1, min(lowest, loss if math.isfinite(loss) else math.inf)
    return failed


class Plateau(TrainerCallback):
    """Reduces the learning rate after each failed evaluation, and ends the training with the fourth.

    Args:
        peak: the learning rate before the first failure.
        since: the step after which losses count.
    """

    def __init__(self, peak: float, since: int = 0) -> None:
        self._peak, self._since = peak, since

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Continue with the learning rate of the run that is resumed; not at all, if it has ended."""
        failed = self._failures(state)
        self._set_rate(failed, lr_scheduler, kwargs["optimizer"])
        control.should_training_stop |= failed >= _FAILURES

    def on_evaluate(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        """Reduce the learning rate, or stop."""
        failed = self._failures(state)
        self._set_rate(failed, lr_scheduler, kwargs["optimizer"])
        if failed >= _FAILURES:
            control.should_training_stop = True

    def _failures(self, state: Any) -> int:
        return failures([loss for step, loss in evaluations(state.log_history) if step > self._since])

    def _set_rate(self, failed: int, schedule: Any, optimizer: Any) -> None:
        """Set the rate from which the schedule, a warm-up, computes that of each step."""
        base = self._peak * _FACTOR**failed
        schedule = getattr(schedule, "scheduler", schedule)  # accelerate's wrapper
        rates = [base * share(schedule.last_epoch) for share in schedule.lr_lambdas]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": [base] * len(rates), "_last_lr": rates})
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

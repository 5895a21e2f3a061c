"""Callbacks that end a training before its last step: Ctrl-C, a budget of tokens, and no lower loss."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback

from weft.distributed import any_process


class StopOnInterrupt(TrainerCallback):
    """At the first Ctrl-C, finish the step, write a checkpoint and end the training. The second Ctrl-C aborts.

    Args:
        saves: whether to write the checkpoint.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.requested = False
        self._saves = saves
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Install the signal handler."""
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # only the main thread can set a handler
            self._previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if any process was interrupted."""
        # Not `requested = any_process(requested)`: that would lose an interrupt during the call.
        if any_process(self.requested, args.device):
            self.requested = True
            control.should_save = self._saves
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the previous signal handler."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class TokenBudget(TrainerCallback):
    """Ends the training after the step that reaches a number of trained tokens.

    Args:
        tokens: the number of tokens; 0 for no limit.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a training that resumes with the number reached."""
        control.should_training_stop |= 0 < self.tokens <= state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop if the number is reached."""
        if self.tokens and state.num_input_tokens_seen >= self.tokens:
            control.should_log = control.should_save = control.should_training_stop = True


class EarlyStopping(EarlyStoppingCallback):
    """Ends the training after a number of evaluations without a lower loss, those before it was resumed included.

    Args:
        patience: the number.
        before: the losses of the run to resume.
    """

    def __init__(self, patience: int, before: Sequence[float] = ()) -> None:
        super().__init__(early_stopping_patience=patience)
        self._before = failed_in_a_row(before)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count those before. End a training that had ended."""
        super().on_train_begin(args, state, control, **kwargs)
        self.early_stopping_patience_counter = self._before
        control.should_training_stop |= self._before >= self.early_stopping_patience


def failed_in_a_row(losses: Sequence[float]) -> int:
    """The number of evaluations after the one with the lowest loss."""
    lowest, failed = math.inf, 0
    for loss in losses:
        lowest, failed = (loss, 0) if loss < lowest else (lowest, failed + 1)
    return failed

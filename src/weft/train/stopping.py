"""What ends a training before its last step: Ctrl-C, and a budget of tokens."""

from __future__ import annotations

import signal
from typing import Any

from transformers import TrainerCallback

from weft.distributed import any_process


class StopOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into an orderly stop: finish the step, write a checkpoint, end. The second one aborts.

    Args:
        saves: write that checkpoint.
    """

    def __init__(self, *, saves: bool = True) -> None:
        self.requested = False
        self._saves = saves
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch for Ctrl-C."""
        try:
            self._previous = signal.signal(signal.SIGINT, self._request)
        except ValueError:  # signals reach the main thread only
            self._previous = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if it came, to whichever process."""
        self.requested = any_process(self.requested, args.device)
        if self.requested:
            control.should_save = self._saves
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class TokenBudget(TrainerCallback):
    """Ends the training with the step that reaches so many trained tokens.

    Args:
        tokens: the budget; 0 is none.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here if they are spent."""
        if self.tokens and state.num_input_tokens_seen >= self.tokens:
            control.should_log = control.should_save = control.should_training_stop = True

"""Shows a training on the screen: an estimate of time and memory, a line per log step, a progress bar, a summary."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from transformers import TrainerCallback

from weft.base_model.usage import peak_memory
from weft.screen.countdown import about, clock, size
from weft.screen.loudness import is_quiet

# Prefixes of the gate's metrics in the log.
_GATE, _SHARE = "gate/", "gate/share/"
_MOST_SHARES = 8
# Entries of the log that are not shown, or shown in another form.
_LEFT_OUT = {"loss", "epoch", "grad_norm", "total_flos", "step"}
# The first step includes the set-up, so the estimate is made from the second one; from the first one if it takes so
# many seconds, which are hardly the set-up.
_LONG_STEP = 10.0
_LEFT_OUT_ENDS = ("_runtime", "_per_second", "_model_preparation_time")
# The learning rate is left out on terminals with fewer columns, as its schedule is known.
_LEARNING_RATE, _LEAST_COLUMNS = "learning_rate", 100


class ProgressLine(TrainerCallback):
    """Prints a line per log step (loss, tokens per second, time left), and a summary at the end.

    On a terminal there is a progress bar too. Before the first line, time and memory are estimated from one step.

    Args:
        max_tokens: the budget of tokens; 0 for none.
        may_stop_earlier: the number of steps is a limit that is rarely reached.
        evaluating: the time of the evaluations, as a multiple of that of the steps.
    """

    def __init__(self, max_tokens: int = 0, *, may_stop_earlier: bool = False, evaluating: float = 0.0) -> None:
        self.max_tokens = max_tokens
        self._evaluating = evaluating
        self._at_most = "at most " if may_stop_earlier else ""
        self.console = Console()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._losses: list[float] = []
        self._start = self._last = self._step_start = (0.0, 0, 0.0)
        self._steps = 0  # of this run
        self._measured = (0.0, 0.0)  # the last one: its seconds, and its share of the training
        self._estimated = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self._start = self._last = self._step_start = self._now(state)
        if state.is_world_process_zero and self.console.is_terminal and not is_quiet():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=1.0, left="")
            self._bar.start()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock anew after an evaluation before the first step."""
        if not self._steps:
            self._start = self._last = self._now(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._step_start = self._now(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the estimate, once, and update the bar."""
        now = self._now(state)
        self._steps += 1
        self._measured = seconds, share = now[0] - self._step_start[0], now[2] - self._step_start[2]
        next_is_last = 1 - now[2] < 1.5 * share
        if self._steps > 1 or next_is_last or seconds >= _LONG_STEP:
            self._estimate(now, args, state)
        if self._bar is not None:
            description = self._step(state)
            left = self._left(now)
            self._bar.update(self._task, completed=self._share(state), description=description, left=left)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Print a line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        parts = [self._step(state)]
        shares: dict[str, float] = {}
        now = self._now(state)
        self._estimate(now, args, state)
        if "loss" in logs:
            self._losses.append(float(logs["loss"]))
            parts.append(f"loss {self._losses[-1]:.4f}")
        for name, value in logs.items():
            if name.startswith(_SHARE):
                shares[name.removeprefix(_SHARE)] = value
            elif name.startswith(_GATE) and not name.endswith("_loss"):
                continue  # for the tools of report_to only
            elif name == _LEARNING_RATE and self._width < _LEAST_COLUMNS:
                continue
            elif name not in _LEFT_OUT and not name.endswith(_LEFT_OUT_ENDS):
                parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        if "loss" in logs:
            parts += [f"{_rate(self._last, now):,.0f} tokens/s", *filter(None, [self._left(now)])]
            self._last = now
        self._print(_in_lines(parts, _named(shares), self._width))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the summary."""
        self.close()
        if state.is_world_process_zero:
            now = self._now(state)
            losses = f", loss {self._losses[0]:.4f} -> {self._losses[-1]:.4f}" if self._losses else ""
            self._print(
                f"trained to step {state.global_step}: {now[1] - self._start[1]:,} tokens in "
                f"{clock(now[0] - self._start[0])}, {_rate(self._start, now):,.0f} tokens/s{losses}"
            )

    def close(self) -> None:
        """Remove the bar from the screen."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def _width(self) -> int:
        return self.console.width if self.console.is_terminal else sys.maxsize

    def _estimate(self, now: tuple[float, int, float], args: Any, state: Any) -> None:
        """Print an estimate of time and memory from the last step, once."""
        seconds, share = self._measured
        if self._estimated or not share or not state.is_world_process_zero:
            return
        self._estimated = True
        if now[2] < 1:
            left = seconds / share * (1 - now[2]) * (1 + self._evaluating)
            peak = peak_memory(args.device)
            memory = "" if peak is None else f"; {size(peak)} of {'GPU ' * (args.device.type == 'cuda')}memory"
            included = " with evaluations" if self._evaluating else ""
            self._print(f"{self._at_most or 'about '}{about(now[0] - self._start[0] + left)}{included}{memory}")

    def _print(self, line: str) -> None:
        if not is_quiet():
            self.console.print(line, markup=False, highlight=False, soft_wrap=not self.console.is_terminal)

    def _step(self, state: Any) -> str:
        return f"step {state.global_step}" if self._at_most else f"step {state.global_step}/{state.max_steps}"

    def _share(self, state: Any) -> float:
        """The fraction of the training that is done, 0 to 1."""
        steps = state.global_step / max(1, state.max_steps)
        return min(1.0, max(steps, state.num_input_tokens_seen / self.max_tokens if self.max_tokens else 0.0))

    def _now(self, state: Any) -> tuple[float, int, float]:
        return time.monotonic(), state.num_input_tokens_seen, self._share(state)

    def _left(self, now: tuple[float, int, float]) -> str:
        done = now[2] - self._start[2]
        return (
            f"{clock((now[0] - self._start[0]) / done * (1 - now[2]))} left" if done > 0 and not self._at_most else ""
        )


def _named(shares: dict[str, float]) -> list[str]:
    """The experts' shares in words; of more than eight experts, the largest seven and the sum of the others."""
    names = list(shares)
    if len(names) > _MOST_SHARES:
        names = sorted(names, key=lambda name: -shares[name])[: _MOST_SHARES - 1]
    words = [f"{name} {shares[name]:.0%}" for name in names]
    others = [share for name, share in shares.items() if name not in names]
    return [*words, f"{len(others)} others {sum(others):.0%}"] if others else words


def _in_lines(parts: list[str], shares: list[str], width: int) -> str:
    """Join the parts into one line; if it is too long for the screen, wrap it between parts, with the shares below."""
    lines = [parts[0]]
    fits = len("  ".join([*parts, *shares])) <= width
    for number, part in enumerate([*parts[1:], *shares], start=1):
        longer = f"{lines[-1]}  {part}"
        if len(longer) > width or (number == len(parts) and not fits):
            lines.append(f"  {part}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _rate(start: tuple[float, int, float], end: tuple[float, int, float]) -> float:
    return (end[1] - start[1]) / max(1e-9, end[0] - start[0])

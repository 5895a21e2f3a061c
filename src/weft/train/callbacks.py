"""Adds metrics of the gate to the log of transformers' `Trainer` and of TRL's trainers."""

from __future__ import annotations

import warnings
from typing import Any

from accelerate.utils import extract_model_from_parallel
from transformers import TrainerCallback

from weft.errors import ConfigError
from weft.gate.metrics import GateMetrics


class GateCallback(TrainerCallback):
    """Adds metrics of the gate since the last line to each line of the training log.

    The keys are those of `GateMetrics.read`: each expert's share and top-1 share, the entropy before and after top-k,
    and the gate's losses, without their weights. They are in `state.log_history` and on the screen. A Trainer calls
    the tools of `report_to` before the callbacks that it is given. To send the metrics to these tools too, call
    `attach` (TensorBoard then shows them as train/gate/...). In distributed training the means are over all processes.

    Raises:
        ConfigError: the model is not a mixture of weft.

    Warns:
        UserWarning: the gate has collapsed, or one of its losses has no effect.

    Example:
        >>> trainer = transformers.Trainer(model, args, train_dataset=rows, callbacks=[weft.GateCallback()])
        >>> weft.GateCallback.attach(trainer)  # for TensorBoard and other tools
        >>> trainer.train()
        >>> trainer.state.log_history[0]["gate/entropy"]
    """

    def __init__(self) -> None:
        self._metrics: GateMetrics | None = None
        self._was_enabled = False
        self._config: Any = None
        self._warned: set[str] = set()

    @classmethod
    def attach(cls, trainer: Any) -> None:
        """Make this the first callback of a Trainer, so that the others get the metrics too.

        Args:
            trainer: transformers' Trainer or a subclass. If it already has a GateCallback, that one is moved.
        """
        callback = trainer.pop_callback(cls) or cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        callback.on_init_end(trainer.args, trainer.state, trainer.control)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Pin no memory where no device would read it, of which torch warns."""
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Switch the metrics on."""
        mixture = extract_model_from_parallel(model, keep_torch_compile=False)
        metrics = getattr(mixture, "gate_metrics", None)
        if not isinstance(metrics, GateMetrics):
            raise ConfigError(
                f"GateCallback cannot follow the model ({type(mixture).__name__}): expected a mixture of weft's, from "
                "weft.from_adapters or weft.from_pretrained"
            )
        self._metrics, self._was_enabled, self._config = metrics, metrics.enabled, mixture.xlora_config
        metrics.clear()
        metrics.enabled = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics to a line of the training log. Lines of evaluations get none."""
        if self._metrics is None or logs is None or "loss" not in logs:
            return
        means = self._metrics.read(across_processes=True)
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)
        if state.is_world_process_zero:
            self._warn_of_losses_without_effect(means)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the metrics back."""
        if self._metrics is not None:
            self._metrics.clear()
            self._metrics.enabled = self._was_enabled

    def _warn_of_losses_without_effect(self, means: dict[str, float]) -> None:
        for name, weight in self._config.gate_loss_weights.items():
            if f"gate/{name}" in means or name in self._warned:
                continue
            self._warned.add(name)
            cause = "no call had `labels`, which label_smoothing_factor and compute_loss_func take out of it"
            if name == "expert_label_loss":
                cause = (
                    "no call had both `labels` and `expert_labels`, whose column the Trainer drops unless "
                    "remove_unused_columns=False, and which the collator must keep"
                )
            warnings.warn(f"{name}_weight ({weight}) has had no effect since the last log: {cause}", stacklevel=2)

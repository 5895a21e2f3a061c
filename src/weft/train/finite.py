"""A training whose loss is NaN or infinite stops at once, with the weights of the last good step.

transformers' Trainer trains on, and leaves such a loss out of its log (`logging_nan_inf_filter`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from weft.distributed import any_process, from_all_processes, is_sharded
from weft.errors import TrainingError, bullet_list

_SHOWN = 60  # characters of each text


class FiniteLoss(TrainerCallback):
    """Raises before the optimizer takes a step with a loss or a gradient that is not finite.

    Each forward pass is checked, so also each of several that make one step. The model keeps the weights that gave the
    last finite loss: where the first loss after a step is not finite, those from before the step. Of several processes
    all stop, whichever had the loss.

    Args:
        trainer: the Trainer to watch; its `training_step` is wrapped.
        tokenizer: turns the batch in question into texts again.

    Example:
        >>> trainer = Trainer(model, arguments, train_dataset=rows)
        >>> FiniteLoss(trainer, tokenizer)
        >>> trainer.train()
    """

    def __init__(self, trainer: Trainer, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._trainer = trainer
        self._training_step = trainer.training_step
        self._batch: Any = None
        self._passes = 0
        self._good: list[Tensor] | None = None
        trainer.training_step = self._checked_step  # type: ignore[method-assign]
        trainer.add_callback(self)

    def _checked_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._batch = inputs.get("input_ids")
        self._passes += 1
        loss = self._training_step(model, inputs, *args, **kwargs)
        finite = bool(torch.isfinite(loss))
        if any_process(not finite, loss.device):
            self._stop(None if finite else f"the loss is {loss.item()}", restore=self._passes == 1)
        return loss

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the gradients, and keep the weights whose losses were finite."""
        weights = self._weights()
        # In float16 accelerate's scaler leaves such steps out itself.
        if getattr(self._trainer.accelerator, "scaler", None) is None:
            norm: Any = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
            norm = norm.full_tensor() if is_sharded(norm) else norm
            if not torch.isfinite(norm):
                self._stop(f"the gradient's norm is {norm.item()}")
        self._keep(weights)
        self._passes = 0

    def _weights(self) -> list[Tensor]:
        model: Any = self._trainer.model
        return [weight for weight in model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def _keep(self, weights: list[Tensor]) -> None:
        weights = _own_parts(weights)
        if self._good is None:
            self._good = [weight.clone() for weight in weights]
        torch._foreach_copy_(self._good, weights)

    @torch.no_grad()
    def _stop(self, what: str | None, *, restore: bool = False) -> None:
        """Raise in all processes, which all come here.

        Args:
            what: is wrong with this process's batch; None where another's is meant.
            restore: the weights from before the last step.
        """
        if restore and self._good is not None:
            torch._foreach_copy_(_own_parts(self._weights()), self._good)
        done = self._trainer.state.global_step
        accumulated = self._trainer.args.gradient_accumulation_steps
        which = f", forward pass {self._passes} of {accumulated}" if accumulated > 1 else ""
        found = from_all_processes(None if what is None else (what, self._texts()))
        wrong = [each for each in found if each is not None]
        texts = list(dict.fromkeys(text for _, own in wrong for text in own))
        error = TrainingError(
            f"training stopped: {wrong[0][0]} at step {done + 1}{which}, with these texts in the batch:"
            f"{bullet_list(texts)}\nThe model keeps the weights that gave the last finite loss. Look at these "
            f"texts and at the adapters, or lower learning_rate ({self._trainer.args.learning_rate})"
        )
        error.in_all_processes = True
        raise error

    def _texts(self) -> list[str]:
        if self._batch is None:
            return ["(no input_ids)"]
        texts = self._tokenizer.batch_decode(self._batch, skip_special_tokens=True)
        return [repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…") for text in texts]


def _own_parts(weights: list[Any]) -> list[Tensor]:
    """The weights; of shards, this process's."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]

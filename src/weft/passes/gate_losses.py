"""Adds the gate's losses to the loss of a call, for any caller: a Trainer, TRL, or a loop.

In training mode, the weighted sum of the losses in `XLoraConfig` is added to the loss of a call with `labels`. In
evaluation mode the loss is the language model's only. The argument `expert_labels` is removed from the call, as base
models do not have it.

With gradient accumulation, the gradient is that of the mean over the micro-batches. A Trainer that passes
`num_items_in_batch`, the number of labels in all micro-batches, does not divide by the number of micro-batches. Then
the language model's loss is a sum over tokens divided by that number, and the gate's losses are multiplied by the
micro-batch's fraction of the labels. TRL's SFTTrainer ignores the loss of a call and computes its own from `log_probs`.
So the gate's losses are connected to `log_probs` in the autograd graph, without a change of its values.

Rows whose labels are all -100 are not in the gate's losses and metrics: they only fill batches in distributed training.
The same holds for texts of one token, which only fill packed rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.utils import ModelOutput

from weft.config import XLoraConfig
from weft.errors import ConfigError, DataError
from weft.gate.losses import NO_EXPERT, balance_loss_of_chosen, entropy_loss, expert_label_loss, token_weights
from weft.gate.metrics import GateMetrics
from weft.gate.routing import TopK, softmax_with_temperature

EXPERT_LABELS = "expert_labels"


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The gate's output for one sequence of tokens (an encoder-decoder has two in a call).

    Attributes:
        shares: the experts' shares before top-k.
        experts: the indices of the experts that top-k has chosen, `[batch, seq, layer, top_k]`; None for all.
        padding: mask of the tokens that are in the losses; None for all.
    """

    shares: Tensor
    experts: Tensor | None
    padding: Tensor | None


@dataclasses.dataclass
class _Call:
    """The present training call: the arguments for its losses, and the gate's outputs so far."""

    labels: Tensor | None
    shift_labels: Tensor | None
    num_items: Tensor | int | None
    expert_labels: Tensor | None
    position_ids: Tensor | None
    answers: list[_Answer] = dataclasses.field(default_factory=list)


class GateLosses:
    """Adds the gate's losses to the loss of each training call.

    Args:
        config: the weights, read in each call.
        shifts_labels: whether token t predicts label t + 1, so that the first label is in no loss.
        labels_are_targets: whether `labels` are the target tokens of an encoder-decoder, -100 for padding.

    Attributes:
        metrics: the metrics of the gate in these calls.
    """

    def __init__(self, config: XLoraConfig, *, shifts_labels: bool, labels_are_targets: bool) -> None:
        self.config = config
        self.shifts_labels = shifts_labels
        self.labels_are_targets = labels_are_targets
        self.metrics = GateMetrics(config.expert_names or list(config.adapters or {}))
        self._call: _Call | None = None

    def begin(self, arguments: dict[str, Any], *, training: bool) -> None:
        """Begin a call: remove `expert_labels` from its arguments.

        Raises:
            DataError: a label is not the index of an expert.
        """
        expert_labels = arguments.pop(EXPERT_LABELS, None)
        self._call = None
        if training:
            self._call = _Call(
                arguments.get("labels"),
                arguments.get("shift_labels"),
                arguments.get("num_items_in_batch"),
                self._checked(expert_labels) if self.config.expert_label_loss_weight else None,
                arguments.get("position_ids"),
            )

    def gate_answered(
        self,
        scalings: Float[Tensor, "batch seq layer expert"],
        followed: Float[Tensor, "batch seq layer expert"],
        chosen: TopK | None,
        padding: Tensor | None,
    ) -> None:
        """Record an output of the gate in the present call.

        Args:
            scalings: the gate's output.
            followed: the same after top-k, as the layers use it.
            chosen: the experts that top-k has chosen; None for all.
            padding: attention mask, or None.
        """
        call = self._call
        if call is None:
            return
        if padding is None and self.labels_are_targets and call.labels is not None:
            padding = call.labels != NO_EXPERT if call.labels.shape == scalings.shape[:2] else None
        if call.labels is not None:
            padding = _without_fill(padding, call, scalings.shape[:2])
        if padding is not None:
            padding = padding.to(scalings.device)
        shares = self._shares(scalings)
        call.answers.append(_Answer(shares, None if chosen is None else chosen.experts, padding))
        if self.metrics.enabled:
            self.metrics.add(shares.detach(), _normalised(followed.detach()), padding)

    def finish(self, output: Any) -> Any:
        """End a call: add the gate's losses to the loss in its output; returns None if there is nothing to add.

        Args:
            output: the base model's output; None after an error.
        """
        call, self._call = self._call, None
        weighted = self.config.gate_loss_weights
        if call is None or output is None or call.labels is None or not call.answers or not weighted:
            return None
        losses = self._losses(call)
        masks = [answer.padding for answer in call.answers if answer.padding is not None]
        self.metrics.add_losses(losses, torch.stack([mask.any() for mask in masks]).any() if masks else None)
        if not losses:
            return None
        total = torch.stack([weighted[name] * loss for name, loss in losses.items()]).sum()
        if isinstance(output, tuple):
            return (_sum(output[0], total * self._part_of_batch(call)), *output[1:])
        if isinstance(output, ModelOutput):
            if output.get("loss") is not None:
                output["loss"] = _sum(output["loss"], total * self._part_of_batch(call))
            if output.get("log_probs") is not None and output.get("label_mask") is not None:
                output["log_probs"] = _WithLoss.apply(output["log_probs"], output["label_mask"], total)
        return output

    def _losses(self, call: _Call) -> dict[str, Tensor]:
        shares = torch.cat([answer.shares for answer in call.answers], dim=1)
        experts = [answer.experts for answer in call.answers if answer.experts is not None]
        padding = None
        if any(answer.padding is not None for answer in call.answers):
            padding = torch.cat([token_weights(answer.shares, answer.padding) for answer in call.answers], dim=1)
        config, losses = self.config, {}
        if config.balance_loss_weight:
            chosen = torch.cat(experts, dim=1) if experts else None
            losses["balance_loss"] = balance_loss_of_chosen(shares, chosen, padding)
        if config.entropy_loss_weight:
            losses["entropy_loss"] = entropy_loss(shares, padding)
        if config.expert_label_loss_weight and call.expert_labels is not None:
            losses["expert_label_loss"] = expert_label_loss(shares, call.expert_labels, padding)
        return losses

    def _shares(self, scalings: Tensor) -> Tensor:
        if self.config.enable_softmax:
            return scalings
        if self.config.enable_softmax_topk:
            return softmax_with_temperature(scalings, 1.0)
        return _normalised(scalings)  # for the metrics only: the losses need a softmax

    def _part_of_batch(self, call: _Call) -> Tensor | float:
        """This call's fraction of the labels in all micro-batches; 1 if the caller divides by their number."""
        if call.num_items is None:
            return 1.0
        labels = call.shift_labels
        if labels is None:
            assert call.labels is not None
            labels = call.labels[..., 1:] if self.shifts_labels else call.labels
        count = (labels != NO_EXPERT).sum()
        return count / (call.num_items.to(count.device) if isinstance(call.num_items, Tensor) else call.num_items)

    def _checked(self, labels: Any) -> Tensor | None:
        if labels is None:
            return None
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
            kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise DataError(f"expert_labels ({kind}) must be a tensor of whole numbers, the number of an expert each")
        num_experts = self.config.num_experts
        wrong = (labels != NO_EXPERT) & ((labels < 0) | (labels >= num_experts))
        if bool(wrong.any()):
            raise DataError(
                f"expert_labels has {labels[wrong][0].item()}, expected 0 to {num_experts - 1}, an expert's place in "
                f"{self.metrics.expert_names}, or {NO_EXPERT} for none"
            )
        return labels

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_call": None}  # part of an autograd graph, which cannot be copied or pickled


class _WithLoss(torch.autograd.Function):
    """Returns the log-probabilities of the labels unchanged; its backward adds the gradient of another loss.

    The weight of that loss is the negative sum of the gradients of the labels' log-probabilities. So it is scaled as
    the loss that the trainer computes from these: by its mean over the tokens of all micro-batches, and by any later
    factor.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, label_mask: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(label_mask)
        ctx.like = loss.device, loss.dtype
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        (gradient,) = gradients
        (label_mask,) = ctx.saved_tensors
        of_labels = gradient.masked_fill(~label_mask.bool(), 0)
        # This synchronises the device, but TRL, the only user, does that in each step anyway.
        if bool((of_labels > 0).any()):
            raise ConfigError(
                "the gate's losses (balance_loss_weight, entropy_loss_weight, expert_label_loss_weight) can only join "
                "a log-likelihood here, but this trainer's loss lowers the probability of some tokens: set them to 0 "
                "and add the functions of weft.losses of get_latest_scalings() in its compute_loss"
            )
        device, dtype = ctx.like
        return gradient, None, -of_labels.sum().to(device, dtype)


def _without_fill(padding: Tensor | None, call: _Call, shape: Sequence[int]) -> Tensor | None:
    """The padding mask `[batch, seq]`, with 0 also for rows and texts that only fill the batch."""
    labels, positions, (batch, seq) = call.labels, call.position_ids, shape
    if labels is None or labels.is_floating_point() or labels.shape[0] != batch:
        return padding
    teaches = (labels != NO_EXPERT).view(batch, -1).any(1)[:, None]
    if padding is None and positions is not None and positions.shape == shape:
        first = positions == 0
        padding = ~(first & torch.cat([first[:, 1:], first.new_ones(batch, 1)], dim=1))
    return teaches.expand(batch, seq) if padding is None else (padding != 0) & teaches.to(padding.device)


def _sum(loss: Tensor, addition: Tensor) -> Tensor:
    return loss + addition.to(loss.device, loss.dtype)


def _normalised(scalings: Tensor) -> Tensor:
    sizes = scalings.abs()
    return sizes / sizes.sum(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)

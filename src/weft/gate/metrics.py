"""Metrics of the gate during training: use of the experts, entropy, collapse.

The sums stay on the gate's device, so that the device is not synchronised before they are read.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from weft.distributed import process_number
from weft.gate.losses import normalised_entropy, token_weights
from weft.options.ranges import GATE_LOSSES

# Above this mean share (after top-k) of one expert, the others have almost no effect.
COLLAPSED = 0.95


class GateMetrics:
    """Means over tokens (without padding) and layers of the training calls since the last `read`.

    Nothing is computed until `enabled` is set. In distributed training each process has its own sums.

    Args:
        expert_names: the experts in the order of the gate's outputs.

    Attributes:
        enabled: whether training calls are added to the sums.
        latest_losses: the gate's losses in the last training call, by name, without their weights; detached.

    Example:
        >>> model.gate_metrics.enabled = True
        >>> ...  # training steps
        >>> model.gate_metrics.read()  # {"gate/share/math": 0.7, ..., "gate/entropy": 0.3, ...}
    """

    def __init__(self, expert_names: Sequence[str]) -> None:
        self.expert_names = list(expert_names)
        self.enabled = False
        self.latest_losses: dict[str, Tensor] = {}
        self.clear()

    def clear(self) -> None:
        """Reset the sums."""
        self._sums: Tensor | None = None
        self._losses: dict[str, Tensor] = {}  # name -> [sum, count]

    @torch.no_grad()
    def add(
        self,
        shares: Float[Tensor, "batch seq layer expert"],
        followed: Float[Tensor, "batch seq layer expert"],
        padding: Shaped[Tensor, "batch total"] | None,
    ) -> None:
        """Add one call to the sums.

        Args:
            shares: the experts' shares before top-k.
            followed: the shares after top-k, normalised to sum to one, as the layers use them.
            padding: attention mask, or None.
        """
        weights = token_weights(shares, padding)
        top = torch.zeros_like(followed).scatter_(-1, followed.argmax(-1, keepdim=True), 1)
        per_token = torch.cat(
            [
                followed,
                top,
                normalised_entropy(shares)[..., None],
                normalised_entropy(followed)[..., None],
                shares.new_ones(*shares.shape[:-1], 1),
            ],
            dim=-1,
        ).mean(2)  # [batch, seq, 2 experts + 3]
        sums = (per_token * weights[..., None]).sum(dim=(0, 1)).float()
        self._sums = sums if self._sums is None else self._sums + sums

    def add_losses(self, losses: dict[str, Tensor], counts: Tensor | None = None) -> None:
        """Add the gate's losses of one call.

        Args:
            losses: name -> loss, without its weight.
            counts: 1 if the call has tokens, 0 if it has only padding; None means 1.
        """
        self.latest_losses = {name: loss.detach() for name, loss in losses.items()}
        if self.enabled:
            for name, loss in self.latest_losses.items():
                once = torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float32)])
                once = once if counts is None else once * counts.to(once.device)
                self._losses[name] = self._losses[name] + once if name in self._losses else once

    def read(self, *, across_processes: bool = False) -> dict[str, float]:
        """The means since the last `read`; then reset the sums. Empty if there were no calls.

        Args:
            across_processes: in distributed training, average over all processes. A collective call then.

        Returns:
            `gate/share/NAME`, an expert's mean share after top-k; `gate/top1/NAME`, the fraction of tokens in which it
            has the largest share; `gate/entropy` and `gate/entropy_followed`, the normalised entropy before and after
            top-k, 0 (one expert) to 1 (equal shares); `gate/LOSS`, the gate's losses without their weights.

        Warns:
            UserWarning: the gate has collapsed: one of several experts has a mean share above 95%.
        """
        names = [f"gate/{kind}/{name}" for kind in ("share", "top1") for name in self.expert_names]
        names += ["gate/entropy", "gate/entropy_followed"]
        means: dict[str, float] = {}
        if self._sums is not None:
            nothing = self._sums.new_zeros(2)
            counted = torch.cat([self._sums, *(self._losses.get(name, nothing) for name in GATE_LOSSES)])
            if across_processes and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(counted)
            *values, tokens = counted[: len(names) + 1].tolist()
            means = {name: value / max(1, tokens) for name, value in zip(names, values, strict=True)}
            for name, (total, count) in zip(GATE_LOSSES, counted[len(names) + 1 :].view(-1, 2).tolist(), strict=True):
                if count:
                    means[f"gate/{name}"] = total / count
        self.clear()
        if not across_processes or process_number() == 0:
            self._warn_of_collapse(means)
        return means

    def _warn_of_collapse(self, means: dict[str, float]) -> None:
        for name in self.expert_names if len(self.expert_names) > 1 else ():
            share = means.get(f"gate/share/{name}", 0.0)
            if share > COLLAPSED:
                warnings.warn(
                    f"the gate has collapsed: expert {name!r} has {share:.1%} of all shares since the last log, above "
                    f"{COLLAPSED:.0%}. If the data should need the others, set balance_loss_weight (0.01 is a start), "
                    "lower the learning rate, or raise softmax_temperature or top_k_lora",
                    stacklevel=3,
                )

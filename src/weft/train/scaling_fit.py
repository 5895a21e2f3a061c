"""Trains the gate's own LoRA in the scaling pass (`gate/scaling_lora.py`), before the gate is fitted.

The LoRA and a linear function c of the scaling pass's hidden states h are trained to predict the target shares q of the
experts (`gate_targets.py`),

    minimise  mean_t -Σ_e q_{t,e} ln softmax(c(h_t))_e

through the decoder layers of the scaling pass. c is then dropped. In the gate's own training the LoRA is frozen, so
that the scaling pass needs no gradients and can be cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.screen.countdown import Countdown
from weft.train.gate_targets import Target, moments, states_of

# Two passes over the tokens, in steps of about 2,048.
_EPOCHS, _LEAST_STEPS, _TOKENS = 2, 64, 2048
_RATE, _LINEAR_RATE, _WARMUP, _MOST_GRADIENT = 2e-3, 3e-3, 10, 1.0
_OF_MOMENTS = 16  # batches from which mean and deviation of the hidden states are taken


def fit_scaling_lora(
    model: Any, examples: Sequence[dict[str, Any]], targets: Sequence[Target], seed: int, countdown: Countdown
) -> None:
    """Train the LoRA of the scaling pass, in place. After an error or an interrupt it is as before.

    Args:
        model: a mixture with `scaling_pass_rank`, in evaluation mode.
        examples: rows of token ids.
        targets: their targets.
        seed: random seed.
        countdown: counts three for each example in a step, as a step takes about three times as long as a pass.

    Raises:
        TrainingError: the model returns NaN for these texts.
    """
    lora = model.internal_xlora_classifier.scaling_pass_lora
    before = {name: value.clone() for name, value in lora.state_dict().items()}
    device = targets[0].shares.device
    lora.requires_grad_(True)
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.autocast(device.type, enabled=False),
            torch.enable_grad(),
        ):
            torch.manual_seed(seed)
            _train(model, lora, examples, targets, countdown)
    except BaseException:
        lora.load_state_dict(before)
        raise
    finally:
        lora.requires_grad_(False)
        lora.zero_grad()


def fit_length(examples: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """(examples in a step, number of steps) for these examples."""
    tokens = sum(len(example["input_ids"]) for example in examples)
    per_step = max(1, round(_TOKENS * len(examples) / tokens))
    return per_step, max(_LEAST_STEPS, math.ceil(_EPOCHS * len(examples) / per_step))


def _train(
    model: Any, lora: nn.Module, examples: Sequence[dict[str, Any]], targets: Sequence[Target], countdown: Countdown
) -> None:
    per_step, steps = fit_length(examples)
    order = _order(len(examples), per_step * steps)
    device = targets[0].shares.device
    with torch.no_grad():
        first = order[: _OF_MOMENTS * per_step]
        states = torch.cat(states_of(model, *_chosen(examples, targets, first)))
        mean, deviation = (moment.to(device) for moment in moments(states.cpu()))  # not all devices have float64
    linear = nn.Linear(len(mean), targets[0].shares.shape[-1]).to(device)
    parameters = list(lora.parameters())
    groups = [{"params": parameters, "peak": _RATE}, {"params": list(linear.parameters()), "peak": _LINEAR_RATE}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate_at(step, steps, _WARMUP)
        chosen = _chosen(examples, targets, order[step * per_step : (step + 1) * per_step])
        hidden = torch.cat(states_of(model, *chosen, to_train=True)).float()
        shares = torch.cat([target.shares for target in chosen[1]])
        loss = cross_entropy(linear((hidden - mean) / deviation), shares)
        learnt = [*parameters, *linear.parameters()]
        # Of no trainable expert; and some layers may not have run, such as experts of a sparse base model.
        gradients = torch.autograd.grad(loss, learnt, allow_unused=True)
        for parameter, gradient in zip(learnt, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, _MOST_GRADIENT)
        optimizer.step()
        countdown.advance(3 * per_step, "training the gate's own LoRA")


def _order(number: int, most: int) -> list[int]:
    """Indices of examples, `most` of them: all in a random order, again and again."""
    return [index for _ in range(-(-most // number)) for index in torch.randperm(number).tolist()][:most]


def _chosen(
    examples: Sequence[dict[str, Any]], targets: Sequence[Target], order: Sequence[int]
) -> tuple[list[dict[str, Any]], list[Target]]:
    return [examples[index] for index in order], [targets[index] for index in order]


def cross_entropy(logits: Tensor, shares: Tensor) -> Tensor:
    """mean_t -Σ_e q_{t,e} ln softmax(z_t)_e, for logits z and target shares q, both [token, expert]."""
    return -(shares * logits.log_softmax(-1)).sum(-1).mean()


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The learning rate's factor: it rises in the first steps, and falls along a cosine."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))

"""What the gate's fit learns from: its input for each token, and target shares q of the experts.

- "labels": q is 1 for the expert that the data names, as in `expert_label_loss_weight`.
- "losses": q_{t,e} = P(expert e wrote the token after t | the whole text) in a hidden Markov model, in which the
  experts write the text in turns. After each token, another expert continues with probability 1/64. The probability of
  a token is the one that the present expert alone gives it after all tokens before. The forward-backward algorithm
  computes this posterior (Rabiner, A tutorial on hidden Markov models, 1989, equation 27). It needs no labels, and one
  forward pass per expert. Tokens that the training's loss ignores (`labels` of -100, for example a user's turns) are
  read, but their probability is set to 1, and positions t before them are not in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from weft.base_model.devices import execution_device, resident_device
from weft.base_model.likelihoods import negative_log_likelihoods
from weft.data.padded import padded
from weft.errors import TrainingError
from weft.gate.losses import NO_EXPERT
from weft.model.model import at_own_weight

_TURN = 64  # mean number of tokens that an expert writes before another one continues
# A channel whose deviation is below this fraction of its mean varies by rounding errors only.
_ROUNDING = 1e-6
TOKENS_AT_A_TIME = 8192  # whose hidden states are converted at once


class Target(NamedTuple):
    """What the gate should answer for an example.

    Attributes:
        kept: which tokens have a target: with "labels" those with a label, with "losses" those before one that counts.
        shares: target share of each expert, for these tokens.
    """

    kept: Bool[Tensor, " token"]
    shares: Float[Tensor, "kept expert"]


def targets_of(model: Any, examples: Sequence[dict[str, Any]], by: str) -> list[Target]:
    """The target of each example. With "losses", each expert reads them.

    Args:
        model: a mixture.
        examples: `input_ids`, and with "labels" `expert_labels`, or with "losses" `counts`: which tokens count.
        by: "labels" or "losses".

    Raises:
        TrainingError: the experts' losses are not finite.
    """
    experts = list(model.xlora_config.expert_names)
    device = resident_device(model.internal_xlora_classifier)
    if by == "labels":
        labels = [example["expert_labels"].to(device) for example in examples]
        kept = [label != NO_EXPERT for label in labels]
        shares = [functional.one_hot(label[own], len(experts)).float() for label, own in zip(labels, kept, strict=True)]
        return [Target(*pair) for pair in zip(kept, shares, strict=True)]
    inputs, lengths = _batch(model, examples)
    counts = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        counts[row, : lengths[row]] = example["counts"]
    table = posterior(losses_of_experts(model, inputs, counts[:, 1:], experts)).float()
    targets = []
    for row, length in enumerate(lengths):
        following = torch.tensor([*range(length - 1), length - 2])  # the last token has the target before it
        counted = counts[row, following + 1]
        targets.append(Target(counted.to(device), _finite(table[row, following[counted]].to(device))))
    return targets


def states_of(
    model: Any, examples: Sequence[dict[str, Any]], targets: Sequence[Target], *, to_train: bool = False
) -> list[Float[Tensor, "token hidden"]]:
    """The gate's input for the tokens of each example that have a target, in the dtype that the base model has it in.

    With `to_train` it has gradients.

    Raises:
        TrainingError: it is not finite.
    """
    inputs, lengths = _batch(model, examples)
    device = resident_device(model.internal_xlora_classifier)
    found = model.passes.scaling_pass_to_train(inputs) if to_train else _gate_inputs(model, inputs)
    return [
        _finite(found[row, :length].to(device)[target.kept])
        for row, (length, target) in enumerate(zip(lengths, targets, strict=True))
    ]


def moments(hidden: Float[Tensor, "token hidden"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, in float32; the latter is 1 for a channel that does not vary.

    Sums run in float64, of a part of the tokens at a time.
    """
    parts = hidden.split(TOKENS_AT_A_TIME)
    mean = torch.stack([part.double().sum(0) for part in parts]).sum(0) / len(hidden)
    deviation = (torch.stack([(part.double() - mean).square().sum(0) for part in parts]).sum(0) / len(hidden)).sqrt()
    varies = deviation > _ROUNDING * mean.abs()
    return mean.float(), torch.where(varies, deviation, 1.0).float()


def _batch(model: Any, examples: Sequence[dict[str, Any]]) -> tuple[dict[str, Tensor], list[int]]:
    """The examples as one padded batch where the model runs, and their lengths."""
    ids, mask = padded([example["input_ids"] for example in examples])
    where = execution_device(model.passes.backbone.module)
    lengths = [len(example["input_ids"]) for example in examples]
    return {"input_ids": ids.to(where), "attention_mask": mask.to(where)}, lengths


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise TrainingError(
            "the gate cannot be fitted: the model's hidden states or the experts' losses are NaN or infinite. Look "
            "at the adapters and the base model's dtype"
        )
    return values


def losses_of_experts(
    model: Any, inputs: dict[str, Tensor], counts: Tensor, experts: Sequence[str]
) -> Float[Tensor, "batch token expert"]:
    """The loss of each expert alone on each token but the first; 0 for tokens that do not count."""
    losses = []
    for name in experts:
        with at_own_weight(model, {name: 1.0}):
            losses.append(negative_log_likelihoods(model(**inputs).logits, inputs["input_ids"]).cpu())
    table = torch.stack(losses, -1).double()
    return table.masked_fill(~counts[..., None], 0.0)  # equal for all experts


def _gate_inputs(model: Any, inputs: dict[str, Tensor]) -> Float[Tensor, "batch seq hidden"]:
    if model.xlora_config.gate_layer is None:
        return model.passes.scaling_pass_alone(inputs)
    seen: list[Tensor] = []

    def take(gate: Any, given: Any) -> None:
        seen.append(given[0])
        raise _SeenError

    hook = model.internal_xlora_classifier.register_forward_pre_hook(take)
    try:
        with suppress(_SeenError):
            model(**inputs)
    finally:
        hook.remove()
        model.passes.carrier.clear()  # as at the end of a complete pass
    return seen[0]


class _SeenError(Exception):
    """Ends a forward pass early, as its later layers are not needed."""


def posterior(losses: Float[Tensor, "batch token expert"]) -> Float[Tensor, "batch token expert"]:
    """The posterior of the forward-backward algorithm, computed in logarithms."""
    tokens, experts = losses.shape[1:]
    move = math.log(1 / _TURN / max(1, experts - 1))
    change = losses.new_full((experts, experts), move).fill_diagonal_(math.log(1 - 1 / _TURN))
    if experts == 1:
        return torch.ones_like(losses)
    forward = [-losses[:, 0]]
    for token in range(1, tokens):
        forward.append(torch.logsumexp(forward[-1][:, :, None] + change, 1) - losses[:, token])
    backward = [torch.zeros_like(forward[0])]
    for token in range(tokens - 1, 0, -1):
        backward.append(torch.logsumexp(change + (backward[-1] - losses[:, token])[:, None], 2))
    return torch.softmax(torch.stack(forward, 1) + torch.stack(backward[::-1], 1), -1)

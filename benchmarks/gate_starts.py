"""What a gate of depth 1 may start from without training: nothing, the experts' prototypes, or their texts' means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from weft.data.texts import read_tokens
from weft.data.windows import opening_of, token_sequences

SEQUENCES = 8  # of each domain, for its mean


@torch.no_grad()
def neutral(model: Any, tokenizer: Any, texts: dict[str, Path]) -> None:
    """All experts alike for every token: λ = 1/N."""
    linear = model.internal_xlora_classifier.layers[-1]
    linear.weight.zero_()
    linear.bias.zero_()


@torch.no_grad()
def prototypes(model: Any, tokenizer: Any, texts: dict[str, Path]) -> None:
    """Arrow's prototypes (arXiv 2405.11157): the input direction that an expert's B A amplifies most, layer by layer.

    Arrow compares them with each layer's own input, by the absolute value of the product, since a singular vector has
    no sign. weft's gate is linear in the last hidden state: layers of another width start neutral, and the sign is
    the one with which the direction agrees with the mean hidden state of the expert's texts.
    """
    neutral(model, tokenizer, texts)
    linear, names = model.internal_xlora_classifier.layers[-1], model.xlora_config.expert_names
    means, _, _ = _statistics(model, tokenizer, texts)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    rows = linear.weight.view(len(layers), len(names), -1)  # [layer, expert, hidden]
    for number, layer in enumerate(layers):
        for column, name in enumerate(names):
            if name in layer.lora_A and layer.in_features == rows.shape[-1]:
                # The right singular vectors of B A are those of R A, where B = Q R.
                small = torch.linalg.qr(layer.lora_B[name].weight.float()).R @ layer.lora_A[name].weight.float()
                direction = torch.linalg.svd(small, full_matrices=False).Vh[0]
                rows[number, column] = direction * torch.sign(direction @ means[column])


@torch.no_grad()
def domain_means(model: Any, tokenizer: Any, texts: dict[str, Path]) -> None:
    """Linear discriminant analysis with a diagonal covariance: the mean hidden state of each expert's texts.

        logit_e = h · (μ_e - μ) / σ² - (|μ_e|² - |μ|²) / 2σ²        by channel, the same in all layers

    Divided by the square root of the width, since channels are far from independent.
    """
    linear, names = model.internal_xlora_classifier.layers[-1], model.xlora_config.expert_names
    means, mean, variance = _statistics(model, tokenizer, texts)
    scale = means.shape[-1] ** 0.5
    weight = (means - mean) / variance / scale  # [expert, hidden]
    bias = -(means.square() - mean.square()).div(2 * variance).sum(-1) / scale
    layers = linear.weight.shape[0] // len(names)
    linear.weight.copy_(weight.repeat(layers, 1))
    linear.bias.copy_(bias.repeat(layers))


def _statistics(model: Any, tokenizer: Any, texts: dict[str, Path]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the last hidden state: each domain's mean [expert, hidden], the mean of these, and the variance within."""
    means, variances = [], []
    with model.disable_adapter():
        for name in model.xlora_config.expert_names:
            sequences = token_sequences(read_tokens(str(texts[name]), tokenizer), 256, opening_of(tokenizer))[
                :SEQUENCES
            ]
            hidden = torch.cat([_last_hidden(model, sequence) for sequence in sequences])  # [token, hidden]
            means.append(hidden.mean(0))
            variances.append(hidden.var(0))
    together = torch.stack(means)
    return together, together.mean(0), torch.stack(variances).mean(0)


def _last_hidden(model: Any, sequence: list[int]) -> torch.Tensor:
    backbone = model.base_model.backbone.module
    return backbone(input_ids=torch.tensor([sequence])).last_hidden_state[0].float()

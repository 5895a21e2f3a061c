"""The routing of tokens to experts as pure functions over tensors of scalings.

Softmaxes run in float32, or in the input's dtype if that is wider.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from weft.errors import ConfigError
from weft.files.reading import shown

# The maximum number of tokens before the cells of a vision model: a class token and seven register tokens.
MAX_LEADING_TOKENS = 8
# The softmax at a lower temperature is the same, one-hot, and logits divided by a still lower one are infinite.
LOWEST_TEMPERATURE = 1e-30
# Weights that are the same for all tokens: {expert: weight} for all layers, or a table [layer, expert].
ConstantWeights = dict[str, float] | Tensor | Sequence[Sequence[float]]


class Sees(enum.Enum):
    """How the input of a LoRA layer relates to the tokens, and so how scalings of tokens apply to it.

    Attributes:
        TOKENS: the tokens in order, `[batch, seq, ...]` or with batch and sequence flattened. In an encoder-decoder,
            the tokens of the part that runs.
        SOURCE: the source tokens, in the decoder of an encoder-decoder.
        KEPT: only the tokens whose logits are wanted (`logits_to_keep`).
        TRANSPOSED: the tokens as `[seq, batch, ...]`.
        PADDED: the tokens, which the model has padded on the right.
        PADDED_TRANSPOSED: both TRANSPOSED and PADDED.
        SAMPLE: other data of each sample, which is not in the order of the tokens: pooled states, cells of an image.
    """

    TOKENS = enum.auto()
    SOURCE = enum.auto()
    KEPT = enum.auto()
    TRANSPOSED = enum.auto()
    PADDED = enum.auto()
    PADDED_TRANSPOSED = enum.auto()
    SAMPLE = enum.auto()


def softmax_with_temperature(
    logits: Float[Tensor, "*batch expert"], temperature: float
) -> Float[Tensor, "*batch expert"]:
    """softmax(logits / temperature) over the experts (arXiv 2402.07148, section 2.1)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.softmax(logits.to(wide) / max(temperature, LOWEST_TEMPERATURE), dim=-1)


class TopK(NamedTuple):
    """Each token's largest scalings and the experts to which they belong.

    Attributes:
        kept: the scalings, `[..., top_k]`.
        experts: the indices of the experts, `[..., top_k]`.
    """

    kept: Tensor
    experts: Tensor


def choose_top_k(scalings: Float[Tensor, "*batch expert"], top_k: int, *, renormalise: bool = False) -> TopK:
    """Each token's `top_k` largest scalings and the indices of their experts.

    Args:
        scalings: the gate's output.
        top_k: number of experts that each token keeps.
        renormalise: replace each token's kept scalings by a softmax over them (`enable_softmax_topk`).
    """
    kept, experts = torch.topk(scalings, k=top_k, dim=-1)
    if renormalise:
        kept = softmax_with_temperature(kept, 1.0).to(scalings.dtype)
    return TopK(kept, experts)


def apply_top_k(
    scalings: Float[Tensor, "*batch expert"], top_k: int | None, *, renormalise: bool = False
) -> tuple[Float[Tensor, "*batch expert"], TopK | None]:
    """The result of `keep_top_k`, and the chosen experts; None if all are kept."""
    num_experts = scalings.shape[-1]
    if top_k is None or top_k >= num_experts:
        return (softmax_with_temperature(scalings, 1.0).to(scalings.dtype) if renormalise else scalings), None
    chosen = choose_top_k(scalings, top_k, renormalise=renormalise)
    return torch.zeros_like(scalings).scatter(-1, chosen.experts, chosen.kept), chosen


def keep_top_k(
    scalings: Float[Tensor, "*batch expert"], top_k: int | None, *, renormalise: bool = False
) -> Float[Tensor, "*batch expert"]:
    """Keep each token's `top_k` largest scalings and set the others to exactly zero.

    Args:
        scalings: the gate's output.
        top_k: number of experts that each token keeps; None keeps all.
        renormalise: replace each token's kept scalings by a softmax over them (`enable_softmax_topk`).

    Returns:
        A tensor of the same shape. A kept scaling can be zero.
    """
    kept, _ = apply_top_k(scalings, top_k, renormalise=renormalise)
    return kept


def keep_each_top_k(
    scalings: Float[Tensor, "*batch expert"], kept: Int[Tensor, "*tokens 1"], *, renormalise: bool
) -> Float[Tensor, "*batch expert"]:
    """`keep_top_k` with a separate k for each token. Experts are ranked by counting, without a sort.

    Args:
        scalings: the gate's output.
        kept: number of experts that each token keeps; it broadcasts. Of equal scalings the first are kept.
        renormalise: replace each token's kept scalings by a softmax over them.
    """
    rank = torch.zeros_like(scalings, dtype=torch.int32)
    numbers = torch.arange(scalings.shape[-1], device=scalings.device)
    for number in range(scalings.shape[-1]):
        other = scalings[..., number : number + 1]
        rank += (other > scalings) | ((other == scalings) & (number < numbers))
    stay = rank < kept
    if renormalise:
        return torch.where(stay, scalings.masked_fill(~stay, -torch.inf).softmax(-1), 0.0)
    return torch.where(stay, scalings, 0.0)


def constant_scalings(
    weights: ConstantWeights, expert_names: list[str], num_layers: int
) -> Float[Tensor, "layer expert"]:
    """A user's weights as a tensor of scalings. With names it has a layer axis of 1, for all layers.

    Args:
        weights: expert name -> weight, 0 for experts that are not named; or a table [layer, expert].
        expert_names: the experts in the order of the columns.
        num_layers: number of LoRA layers.

    Raises:
        ConfigError: a name is unknown, the table has another shape, or a weight is not finite.
    """
    if isinstance(weights, dict):
        unknown = sorted(map(str, set(weights) - set(expert_names)))
        if unknown:
            raise ConfigError(f"weights names {unknown}, expected names among {expert_names}")
        try:
            table = torch.tensor([[float(weights.get(name, 0)) for name in expert_names]])
        except (TypeError, ValueError, OverflowError) as err:
            raise ConfigError(f"weights ({shown(weights)}) must be finite numbers: {err}") from err
    else:
        try:
            table = torch.as_tensor(weights, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError, OverflowError) as err:
            raise ConfigError(f"weights is no table [layer, expert] of numbers: {err}") from err
        if table.shape != (num_layers, len(expert_names)):
            raise ConfigError(
                f"weights has shape {list(table.shape)}, expected [{num_layers}, {len(expert_names)}]: a row for each "
                "LoRA layer (xlora_config.layer_names), a column for each expert (xlora_config.expert_names)"
            )
    if not table.isfinite().all():
        raise ConfigError(f"weights ({shown(weights)}) must be finite numbers")
    return table


def present_positions(padding: Shaped[Tensor, "batch total"], positions: int) -> Bool[Tensor, "batch positions"]:
    """True at positions with a token, from the last columns of an attention mask.

    Raises:
        ValueError: the mask has fewer columns than there are positions.
    """
    if padding.shape[1] < positions:
        raise ValueError(
            f"attention_mask has {padding.shape[1]} columns, expected at least {positions}, one for each position that "
            "the gate reads: it cannot be told which of them are padding"
        )
    return padding[:, -positions:] != 0


def mean_over_tokens(
    scalings: Float[Tensor, "batch seq expert"], padding: Shaped[Tensor, "batch total"] | None
) -> Float[Tensor, "batch 1 expert"]:
    """The mean scalings of each sample over its tokens, without padding.

    Args:
        scalings: one layer's scalings.
        padding: attention mask, non-zero for tokens; its last `seq` columns are for these tokens. None: no padding.
    """
    if padding is None:
        return scalings.mean(dim=1, keepdim=True)
    present = present_positions(padding, scalings.shape[1]).to(scalings.dtype)[..., None]  # [batch, seq, 1]
    return (scalings * present).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)


def align_to_tokens(
    scalings: Float[Tensor, "batch seq expert"], batch: int, cells: tuple[int, ...], *, padded: bool = False
) -> Float[Tensor, "..."]:
    """Reshape scalings of tokens to the axes of activations `[batch, *cells, channel]` of the same tokens.

    Args:
        scalings: one layer's scalings.
        batch: size of the activations' first axis.
        cells: sizes of the axes between the first one and the channels: the tokens, and other axes after them. Empty if
            batch and sequence are flattened.
        padded: the activations may have more positions than tokens, on the right; the scalings there are 0.

    Returns:
        Scalings that broadcast against `[batch, *cells, expert]`.

    Raises:
        ValueError: the activations do not have these tokens.
    """
    samples, seq, num_experts = scalings.shape
    if cells and samples == batch and (cells[0] == seq or (padded and cells[0] > seq)):
        scalings = F.pad(scalings, (0, 0, 0, cells[0] - seq)) if cells[0] > seq else scalings
        return scalings.view(batch, cells[0], *(1 for _ in cells[1:]), num_experts)
    if not cells and batch == samples * seq:
        return scalings.reshape(batch, num_experts)
    raise _no_fit(scalings, batch, cells)


def align_to_cells(
    scalings: Float[Tensor, "samples seq expert"],
    batch: int,
    cells: tuple[int, ...],
    padding: Shaped[Tensor, "samples total"] | None = None,
) -> Float[Tensor, "..."]:
    """Convert scalings of tokens to the axes of any activations `[batch, *cells, channel]`.

    The input of a layer can differ from the gate's sequence: a convolution has an image, a pooling head one vector per
    sample, and some models flatten batch and sequence. The first rule that matches is used:

    1. Scalings of a single position are used for all cells of a sample.
    2. With as many positions as cells, each cell has one position. Up to eight more positions are allowed if there are
       several cell axes: the leading ones are class or register tokens and are dropped.
    3. If batch and sequence are flattened into one axis, the scalings are flattened too. Scalings of a single position
       are used for all cells of the row.
    4. Otherwise the mean over each sample's tokens is used, without padding.

    Args:
        scalings: one layer's scalings; `samples` is the batch size, or 1 if all samples share them.
        batch: size of the activations' first axis.
        cells: sizes of the axes between the first one and the channels; empty for `[batch, channel]`.
        padding: attention mask of the tokens, for the mean.

    Returns:
        Scalings that broadcast against `[batch, *cells, expert]`.

    Raises:
        ValueError: the first axis of the activations fits neither the samples nor the tokens.
    """
    samples, seq, num_experts = scalings.shape
    if samples in (1, batch):
        if seq == 1:
            return scalings.view(samples, *(1 for _ in cells), num_experts)
        num_cells = 1
        for size in cells:
            num_cells *= size
        extra = seq - num_cells
        if extra == 0 or (len(cells) > 1 and 0 < extra <= MAX_LEADING_TOKENS and extra < num_cells):
            return scalings[:, extra:].reshape(samples, *cells, num_experts)
        if cells or batch == samples:
            return mean_over_tokens(scalings, padding).view(samples, *(1 for _ in cells), num_experts)
    if not cells and batch == samples * seq:
        return scalings.reshape(batch, num_experts)
    if not cells and seq == 1 and batch % samples == 0:
        return scalings.repeat_interleave(batch // samples, 0).view(batch, num_experts)
    raise _no_fit(scalings, batch, cells)


def _no_fit(scalings: Tensor, batch: int, cells: tuple[int, ...]) -> ValueError:
    samples, seq, _ = scalings.shape
    return ValueError(
        f"scalings of {samples} samples x {seq} tokens do not fit activations of shape [{batch}, "
        + "".join(f"{size}, " for size in cells)
        + "channels]: their first axis must be the batch, or batch x tokens flattened"
    )

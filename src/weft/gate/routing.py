"""The mathematics of routing, as pure functions over tensors.

Nothing here knows about modules, models or peft: scalings go in, scalings come out. Softmaxes run in float32 (or the
input's dtype where that is wider).
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

# One class token and up to seven register or distillation tokens may precede the cells of a vision model.
MAX_LEADING_TOKENS = 8
# Weights that do not depend on the token: {expert: weight} in all layers, or a table [layer, expert].
ConstantWeights = dict[str, float] | Tensor | Sequence[Sequence[float]]


class Sees(enum.Enum):
    """What the input of a LoRA layer is made of, so what scalings over tokens mean in it.

    Attributes:
        TOKENS: the tokens in order, `[batch, seq, ...]` or batch and sequence flattened; of an encoder-decoder, those
            of the part that runs.
        SOURCE: an encoder-decoder's source tokens, in its decoder.
        KEPT: the tokens whose logits a call asks for (`logits_to_keep`).
        TRANSPOSED: the tokens as `[seq, batch, ...]`.
        PADDED: the tokens, filled up on the right by the model.
        PADDED_TRANSPOSED: both.
        SAMPLE: something else of each sample, outside of a text's order: pooled states, cells of an image.
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
    return torch.softmax(logits.to(wide) / temperature, dim=-1)


class TopK(NamedTuple):
    """Each token's largest scalings, and the experts that have them.

    Attributes:
        kept: these scalings, `[..., top_k]`.
        experts: the experts' numbers, `[..., top_k]`.
    """

    kept: Tensor
    experts: Tensor


def choose_top_k(scalings: Float[Tensor, "*batch expert"], top_k: int, *, renormalise: bool = False) -> TopK:
    """Each token's `top_k` largest scalings and whose they are.

    Args:
        scalings: the gate's output, any leading axes.
        top_k: how many experts each token keeps.
        renormalise: replace the kept values by a softmax over them, token by token (`enable_softmax_topk`).
    """
    kept, experts = torch.topk(scalings, k=top_k, dim=-1)
    if renormalise:
        kept = softmax_with_temperature(kept, 1.0).to(scalings.dtype)
    return TopK(kept, experts)


def apply_top_k(
    scalings: Float[Tensor, "*batch expert"], top_k: int | None, *, renormalise: bool = False
) -> tuple[Float[Tensor, "*batch expert"], TopK | None]:
    """`keep_top_k`, and what was chosen; None where all are kept."""
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
        scalings: the gate's output, any leading axes.
        top_k: how many experts each token keeps; None keeps all of them.
        renormalise: replace the kept values by a softmax over them, token by token (`enable_softmax_topk`).

    Returns:
        A tensor of the same shape. Which experts are kept is decided by their rank alone, so a kept value that
        happens to be zero stays kept.
    """
    kept, _ = apply_top_k(scalings, top_k, renormalise=renormalise)
    return kept


def keep_each_top_k(
    scalings: Float[Tensor, "*batch expert"], kept: Int[Tensor, "*tokens 1"], *, renormalise: bool
) -> Float[Tensor, "*batch expert"]:
    """`keep_top_k` with a number of its own for each token, without a sort: an expert's rank is counted.

    Args:
        scalings: the gate's output, any leading axes.
        kept: how many experts each keeps, of equal ones the first; its axes may be 1.
        renormalise: replace what is kept by a softmax over it.
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
    """Weights chosen by a user as a tensor of scalings; a layer axis of 1 is shared by all layers.

    Args:
        weights: expert name -> weight, where experts left out have weight 0; or a table [layer, expert].
        expert_names: the experts in the order of the columns.
        num_layers: how many LoRA layers there are.

    Raises:
        ConfigError: a name is no expert's, the table has another shape, or a weight is no finite number.
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
    """Where there is a token, by a mask whose last columns are those of the positions.

    Raises:
        ValueError: the mask has fewer columns.
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
    """Each sample's mean scalings over its unpadded tokens.

    Args:
        scalings: one layer's scalings.
        padding: attention mask, non-zero where there is a token; its last `seq` columns belong to these tokens.
    """
    if padding is None:
        return scalings.mean(dim=1, keepdim=True)
    present = present_positions(padding, scalings.shape[1]).to(scalings.dtype)[..., None]  # [batch, seq, 1]
    return (scalings * present).sum(dim=1, keepdim=True) / present.sum(dim=1, keepdim=True).clamp(min=1)


def align_to_tokens(
    scalings: Float[Tensor, "batch seq expert"], batch: int, cells: tuple[int, ...], *, padded: bool = False
) -> Float[Tensor, "..."]:
    """Give scalings over tokens the axes of activations `[batch, *cells, channel]` of these tokens.

    Args:
        scalings: one layer's scalings.
        batch: size of the activations' first axis.
        cells: the activations' axes between the first and the channels: the tokens and perhaps others, or none where
            batch and sequence are flattened into the first.
        padded: there may be more positions than tokens, on the right; their scalings are 0.

    Returns:
        Scalings that broadcast against `[batch, *cells, expert]`.

    Raises:
        ValueError: the activations are not of these tokens.
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
    """Give scalings over tokens the axes of activations `[batch, *cells, channel]`.

    A layer does not always see the sequence as the gate saw it: a convolution sees an image, a pooling head one vector
    a sample, some models flatten batch and sequence. The rules, first match wins:

    1. scalings of a single position hold for all of a sample's cells;
    2. as many positions as cells: one each; with up to eight positions more, the leading ones are class or register
       tokens and are left out (only where the activations have more than one cell axis);
    3. batch and sequence flattened into one axis: the same order, flattened; single positions hold for a row's cells;
    4. anything else: the mean over each sample's unpadded tokens.

    Args:
        scalings: one layer's scalings; `samples` is the batch size, or 1 for scalings shared by all.
        batch: size of the activations' first axis.
        cells: the activations' axes between the first and the channels; empty for `[batch, channel]`.
        padding: attention mask of the tokens, for the mean.

    Returns:
        Scalings that broadcast against `[batch, *cells, expert]`.

    Raises:
        ValueError: neither the samples nor the tokens can be matched with the activations' first axis.
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

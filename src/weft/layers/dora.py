"""DoRA experts in a mixture (arXiv 2402.09353; `allow_dora`).

A DoRA expert rescales each output channel o of W + s B A to the norm m_o. It adds to the output of the base layer

    λ · g · ( (m / n − 1) · W x  +  (m / n) · s · B A x ),        n = ‖W + s B A‖, the norm over the inputs

s · m / n is multiplied into B, so there are still two stacked products. W x is the base layer's output without its
bias, so it needs no third product. Only if dropout is active does each expert need its own product with W, as W is
applied to the expert's dropped input (as in peft).

Computing n costs about as much as a product with W, so it is kept until one of its inputs changes. As in peft and in
section 4.3 of the paper, n is a constant for the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.errors import AdapterError
from weft.layers.experts import Stack, StorageLayout


@dataclass(frozen=True)
class DoraFactors:
    """The factors of a stack of DoRA experts.

    Attributes:
        change: m / n − 1, the factor of W x for each expert.
        up: s · m / n · B, transposed.
    """

    change: Float[Tensor, "expert out"]
    up: Float[Tensor, "rank out"]

    def change_of_base(self, weights: Tensor, expert_axis: int, plain: Tensor | list[Tensor]) -> Tensor:
        """Σ_e λ_e · g · (m_e / n_e − 1) · W x_e.

        Args:
            weights: λ · g, with the experts at the axis at which `plain` has its channels.
            expert_axis: the index of this axis in `weights`.
            plain: W x, or a list with W x_e of each expert.
        """
        if isinstance(plain, Tensor):
            factors = weights.movedim(expert_axis, -1) @ self.change.to(weights.dtype)
            return factors.movedim(-1, expert_axis) * plain
        after = [1] * (weights.dim() - 1 - expert_axis)
        parts = [
            weights.narrow(expert_axis, expert, 1) * change.view(-1, *after) * one
            for expert, (change, one) in enumerate(zip(self.change, plain, strict=True))
        ]
        return torch.stack(parts).sum(0)


class Dora:
    """The factors of one layer's DoRA experts, computed again only if one of their inputs has changed.

    If one of these parameters is trained, the factors are computed in each call, with gradients for B and m. A compiled
    graph uses the factors of the last call that was not compiled, as with stacks.

    Args:
        target: peft's LoRA layer.
        layout: the attributes of A and B.
        as_rows: converts the base layer's weight to W, [out, in].
        channel_axis: channel axis of the base layer's output.
    """

    def __init__(
        self, target: LoraLayer, layout: StorageLayout, as_rows: Callable[[Tensor], Tensor], channel_axis: int
    ) -> None:
        self.target: Any = target
        self.layout = layout
        self.as_rows = as_rows
        self.channel_axis = channel_axis
        # Stacks of one layer differ in dtype or device.
        self._kept: dict[tuple[torch.dtype, torch.device], tuple[Stack, list[Tensor], list[Any], DoraFactors]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def factors(self, stack: Stack, up: Tensor) -> DoraFactors:
        """The factors of a stack; `up` is B transposed, connected to autograd."""
        key = stack.down.dtype, stack.down.device
        kept = self._kept.get(key)
        if torch.compiler.is_compiling() and kept is not None and not torch.is_grad_enabled():
            return kept[3]
        sources = self._sources(stack)
        if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
            # Some optimizers change parameters without a change of the version counter, so drop the kept factors.
            self._kept.pop(key, None)
            return self._compute(stack, up)
        if torch.compiler.is_compiling():
            return self._compute(stack, up) if kept is None else kept[3]
        if not stack.kept:
            return self._compute(stack, up)
        state = [(source.data_ptr(), _version(source)) for source in sources]
        if kept is not None and kept[0] is stack and kept[2] == state and all(map(_same, kept[1], sources)):
            return kept[3]
        # Not in inference mode: its tensors cannot be used in training.
        with torch.inference_mode(False), torch.no_grad():
            factors = self._compute(stack, stack.up)
        self._kept[key] = stack, sources, state, factors
        return factors

    def plain(self, result: Tensor) -> Tensor:
        """W x: the base layer's output without its bias."""
        bias = getattr(self.target.get_base_layer(), "bias", None)
        if bias is None:
            return result
        return result - bias.view(-1, *(1 for _ in range(self.channel_axis % result.dim() + 1, result.dim())))

    def plain_of_each(self, inputs: list[Tensor]) -> list[Tensor]:
        """W x for each expert's x."""
        base = self.target.get_base_layer()
        return [self.plain(base(x.to(base.weight.dtype))) for x in inputs]

    def _sources(self, stack: Stack) -> list[Tensor]:
        target, layout = self.target, self.layout
        experts = [
            parameter
            for name in stack.names
            for parameter in (
                layout.down.find(target, name),
                layout.up.find(target, name),
                target.lora_magnitude_vector[name].weight,
            )
        ]
        return [target.get_base_layer().weight, *experts]

    def _compute(self, stack: Stack, up: Tensor) -> DoraFactors:
        target = self.target
        wide = torch.promote_types(up.dtype, torch.float32)
        names, scales = stack.names, [float(target.scaling[name]) for name in stack.names]
        base = self.as_rows(target.get_base_layer().weight.detach()).to(up.device, wide)
        norms = [
            torch.linalg.vector_norm(torch.addmm(base, up_rows.T, down_rows.flatten(1), alpha=scale), dim=1)
            for scale, down_rows, up_rows in zip(
                scales,
                stack.down.detach().to(wide).split(stack.ranks),
                stack.up.detach().to(wide).split(stack.ranks),
                strict=True,
            )
        ]
        norm = torch.stack(norms)  # [expert, out]
        # A row of zeros stays zero with any factor.
        norm = torch.where(norm == 0, 1, norm)
        magnitude = torch.stack([target.lora_magnitude_vector[name].weight.flatten() for name in names])
        factor = magnitude.to(up.device, wide) / norm
        scaled = factor * torch.tensor(scales, dtype=wide, device=up.device)[:, None]
        per_rank = torch.cat([row.expand(rank, -1) for row, rank in zip(scaled, stack.ranks, strict=True)])
        return DoraFactors(change=(factor - 1).to(up.dtype), up=up * per_rank.to(up.dtype))


def refuse_base_of_dora(target: LoraLayer, path: str, names: Sequence[str]) -> None:
    """Raise if the norms of a base layer cannot be computed, or if peft's norms differ from the definition.

    Args:
        target: peft's LoRA layer.
        path: the layer's name in the base model.
        names: the layer's experts.

    Raises:
        AdapterError: a DoRA expert is on a quantised or offloaded layer, or on a grouped convolution.
    """
    dora = [name for name in names if target.use_dora.get(name, False)]
    base: Any = target.get_base_layer()
    if not dora:
        return
    if type(base.weight) is not nn.Parameter or not base.weight.is_floating_point():
        raise AdapterError(
            f"adapter {dora[0]!r} uses DoRA on layer {path!r}, whose weight is quantised "
            f"({type(base.weight).__name__} of {base.weight.dtype}): X-LoRA supports DoRA on float weights only. Load "
            "the base model without quantisation, or leave the adapter out"
        )
    if base.weight.is_meta:
        raise AdapterError(
            f"adapter {dora[0]!r} uses DoRA on layer {path!r}, whose weight is not in memory (device meta), so that "
            "its norms cannot be computed: load the base model without offloading, or leave the adapter out"
        )
    if getattr(base, "groups", 1) != 1:
        raise AdapterError(
            f"adapter {dora[0]!r} uses DoRA on layer {path!r}, a convolution with groups ({base.groups}), of which "
            "peft takes the norms of another matrix than W + s B A: leave the adapter out"
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(one: Any, other: Any) -> bool:
    return one is other

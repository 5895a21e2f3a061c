"""A linear layer of vLLM with a mixture in it: the sum of the experts is added to the output of the layer's own method.

    y_t = W x_t + Σ_e  λ_{t,l,e} · g · s_{l,e} · B_{l,e} A_{l,e} x_t

for each slice l of a layer that vLLM has fused (q, k and v; gate and up). See arXiv 2402.07148, equation 3. In a
row-parallel layer, vLLM sums y over the processes after this, and with it the experts' parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from weft.errors import ConfigError
from weft.serve.following import Following
from weft.serve.mixture import Factors, padded_rank


@dataclass(frozen=True)
class Slice:
    """A part of a layer's output that experts adapt.

    Attributes:
        number: number of the LoRA layer, in the layer axis of the scalings.
        start: index of its first channel in the output.
        width: number of its channels.
        factors: the factors of each expert; None for an expert that does not adapt this layer.
    """

    number: int
    start: int
    width: int
    factors: tuple[Factors | None, ...]


class Product:
    """The product x W with a fixed W, by the fastest available kernel.

    On a CPU, a small product in half precision takes 50 us in torch, and 20 us with vLLM's kernels, for which W is
    packed. In float32, torch is faster. (1 to 32 rows, 576 to 192; Xeon with AMX, 2026-11-27, by hand.)

    Args:
        weight: W, [in, out].
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight: Tensor | None = weight
        if weight.device.type == "cpu" and weight.dtype != torch.float32:
            self._packed: Any = nn.Module()  # gets its product from vLLM
            self._packed.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
            dispatch_cpu_unquantized_gemm(self._packed, remove_weight=True)
            self._weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """x W, [token, out]."""
        if self._weight is not None:
            return torch.mm(x, self._weight)
        product: Tensor = self._packed.cpu_linear(x, self._packed.weight, None)
        return product

    def add_to(self, rows: Tensor, x: Tensor) -> None:
        """Add x W to these rows, in place."""
        if self._weight is not None:
            rows.addmm_(x, self._weight)
        else:
            rows.add_(self(x))


class MixtureMethod(LinearMethodBase):
    """A layer's `quant_method` that calls the original one and adds the experts.

    Args:
        method: the layer's original `quant_method`.
        following: has the scalings.
        place: index of the layer in `of_layers`.
        slices: the adapted slices, in the order of the output.
        layer_width: number of channels of the whole output.
        device: device of the layer.
    """

    def __init__(
        self,
        method: Any,
        following: Following,
        place: int,
        slices: list[Slice],
        *,
        layer_width: int,
        device: torch.device,
    ) -> None:
        self.method = method
        self.following = following
        self.slices = slices
        self.rank = max(padded_rank(each.factors) for each in slices)
        self.width = following.num_experts * self.rank
        self.place = place
        options: dict[str, Any] = {"device": device, "dtype": following.dtype}
        down = torch.cat([_stacked_down(each, self.rank) for each in slices]).t().contiguous().to(**options)
        ups = [_stacked_up(each, self.rank).contiguous().to(**options) for each in slices]
        self.down, self.ups = Product(down), [Product(up) for up in ups]
        self.whole = len(slices) == 1 and slices[0].width == layer_width
        biases = [(each, _stacked_bias(each)) for each in slices]
        self.biases = [(each, bias.to(**options)) for each, bias in biases if bias is not None]

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Not used: the layer has its weights already."""
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of the original method plus the sum of the experts."""
        output = self.method.apply(layer, x, bias)
        of_layers = self.following.of_layers
        if of_layers is None:
            return output
        hidden = self.down(x.reshape(-1, x.shape[-1]))
        hidden = (hidden.view(len(hidden), -1, self.rank) * of_layers[self.place]).view(len(hidden), -1)
        rows = output.view(-1, output.shape[-1])
        if self.whole:
            self.ups[0].add_to(rows, hidden)
        else:
            for part, of_part, up in zip(self.slices, hidden.split(self.width, 1), self.ups, strict=True):
                up.add_to(rows.narrow(1, part.start, part.width), of_part)
        for part, biases in self.biases:
            rows.narrow(1, part.start, part.width).add_(self._of_biases(biases))
        return output

    def _of_biases(self, biases: Tensor) -> Tensor:
        """The term of `lora_bias`, to which λ does not apply."""
        of_tokens = self.following.of_biases
        if of_tokens is None:
            return biases.sum(0) * self.following.choices.own_weight
        return of_tokens.to(biases.dtype) @ biases


class ScalingLoraMethod(LinearMethodBase):
    """A layer's `quant_method` that, in the scaling pass only, adds the gate's own LoRA: B A x in each slice.

    Args:
        method: the layer's `quant_method`, with or without a mixture in it.
        following: tells which pass runs.
        slices: the adapted slices, in the order of the output, each with one pair of factors.
        device: device of the layer.
    """

    def __init__(self, method: Any, following: Following, slices: list[Slice], *, device: torch.device) -> None:
        self.method = method
        self.following = following
        self.slices = slices
        self.ranks = [padded_rank(each.factors) for each in slices]
        options: dict[str, Any] = {"device": device, "dtype": following.dtype}
        pairs = list(zip(slices, self.ranks, strict=True))
        self.down = Product(torch.cat([_stacked_down(*pair) for pair in pairs]).t().contiguous().to(**options))
        self.ups = [Product(_stacked_up(*pair).contiguous().to(**options)) for pair in pairs]

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Not used: the layer has its weights already."""
        raise NotImplementedError

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of the method, plus the LoRA in the scaling pass."""
        output = self.method.apply(layer, x, bias)
        if not self.following.in_scaling_pass:
            return output
        parts = self.down(x.reshape(-1, x.shape[-1])).split(self.ranks, 1)
        rows = output.view(-1, output.shape[-1])
        for each, part, up in zip(self.slices, parts, self.ups, strict=True):
            up.add_to(rows.narrow(1, each.start, each.width), part)
        return output


def own_part(layer: Any, factors: tuple[Factors | None, ...], place: int, width: int) -> tuple[Factors | None, ...]:
    """The shard of a slice's factors for this process, with tensor parallelism.

    A column-parallel layer has some rows of W, and so of B. A row-parallel layer has some columns of W, and so of A;
    only the first process adds the bias, as the outputs are summed.

    Args:
        layer: vLLM's layer.
        factors: the full factors.
        place: index of the slice in the layer.
        width: number of the slice's channels in this process.

    Raises:
        ConfigError: the experts adapt a fused layer as a whole, so its parts cannot be sharded separately.
    """
    rank, size = getattr(layer, "tp_rank", 0), getattr(layer, "tp_size", 1)
    if size == 1 or isinstance(layer, ReplicatedLinear):
        return factors
    if isinstance(layer, RowParallelLinear):
        columns = slice(rank * layer.input_size_per_partition, (rank + 1) * layer.input_size_per_partition)
        return tuple(
            each and replace(each, down=each.down[:, columns], bias=each.bias if rank == 0 else None)
            for each in factors
        )
    if len(getattr(layer, "output_partition_sizes", [width])) > 1 and width != layer.output_partition_sizes[place]:
        raise ConfigError(
            f"tensor_parallel_size ({size}) must be 1: the experts adapt a layer whose parts (q, k and v, or gate and "
            f"up) are fused in the base model, too"
        )
    # If there are more processes than key/value heads, several processes have the same head.
    number = rank // layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and place > 0 else rank
    rows = slice(number * width, (number + 1) * width)
    return tuple(
        each and replace(each, up=each.up[rows], bias=None if each.bias is None else each.bias[rows])
        for each in factors
    )


def _stacked_down(part: Slice, rank: int) -> Tensor:
    """A of all experts, [expert * rank, in]; zeros for experts that do not adapt the layer."""
    width = next(each.down.shape[1] for each in part.factors if each is not None)
    stacked = torch.zeros(len(part.factors), rank, width)
    for number, each in enumerate(part.factors):
        if each is not None:
            stacked[number, : len(each.down)] = each.down
    return stacked.flatten(0, 1)


def _stacked_up(part: Slice, rank: int) -> Tensor:
    """s · B of all experts, transposed, [expert * rank, out]."""
    stacked = torch.zeros(len(part.factors), rank, part.width)
    for number, each in enumerate(part.factors):
        if each is not None:
            stacked[number, : each.up.shape[1]] = each.up.t() * each.scaling
    return stacked.flatten(0, 1)


def _stacked_bias(part: Slice) -> Tensor | None:
    """s · b of all experts, [expert, out]; None if no expert has a `lora_bias`."""
    if all(each is None or each.bias is None for each in part.factors):
        return None
    stacked = torch.zeros(len(part.factors), part.width)
    for number, each in enumerate(part.factors):
        if each is not None and each.bias is not None:
            stacked[number] = each.bias * each.scaling
    return stacked

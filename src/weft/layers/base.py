"""The mixture of experts in one LoRA layer: the base class of all kinds of layers.

    y_t = W x_t + Σ_e  s_e · g · B_e( A_e( dropout( λ_{t,e} · x_t ) ) )

with peft's `scaling` s_e, the scalings λ and the global weight g (arXiv 2402.07148, equation 3; λ = g = 1 if there are
no scalings). λ is applied to h = A x, where it costs one multiplication per rank. All experts together need two matrix
products, one with the stacked A and one with the stacked B. Subclasses define A and B.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.config import XLoraConfig
from weft.gate.routing import Sees, align_to_cells, align_to_tokens, keep_top_k
from weft.kernels.reference import scale_ranks
from weft.layers.carrier import ReadyWeights, Routing, ScalingsCarrier
from weft.layers.dora import Dora
from weft.layers.experts import Stack, StackedExperts, StorageLayout

_TRANSPOSED = (Sees.TRANSPOSED, Sees.PADDED_TRANSPOSED)
_AS_THE_GATE = (Sees.TOKENS, Sees.PADDED, Sees.SAMPLE)


class XLoraLayer(ABC):
    """Wraps one LoRA layer of peft; its `forward` replaces the LoRA layer's own.

    The base class for each kind of layer (`XLoraLinearLayer`, ...).

    Dtypes: the input is cast to the dtype of the experts, in which the two products run. The sum with the base layer's
    output has the wider of the two dtypes. The result has the input's dtype, for embeddings the base layer's.

    Args:
        model: the X-LoRA model; its `carrier` has the scalings of the present call.
        target: peft's LoRA layer.
        target_forward: the LoRA layer's own forward, kept for reference.
        layer_number: index of this layer in the layer axis of the scalings.
        config: options; `top_k_lora`, `enable_softmax_topk` and `global_scaling_weight` are read in each forward.

    Raises:
        AdapterError: an active adapter uses DoRA and `allow_dora` is off, or another variant of LoRA. Raised when the
            experts are stacked, at the latest in the first forward.

    Example:
        >>> target = LoraModel(nn.Sequential(nn.Linear(16, 32)), LoraConfig(target_modules=["0"]), "a").model[0]
        >>> config = XLoraConfig(adapters={"a": "adapters/a"})
        >>> layer = XLoraLinearLayer(None, target, target.forward, layer_number=0, config=config)
        >>> layer.forward(torch.randn(2, 5, 16), scalings=torch.ones(2, 5, 1, 1)).shape
        torch.Size([2, 5, 32])
    """

    layout: StorageLayout
    # The axis of ranks in h, and of channels in the output.
    channel_axis = -1

    def __init__(
        self,
        model: Any,
        target: LoraLayer,
        target_forward: Callable[..., Any],
        layer_number: int,
        config: XLoraConfig,
    ) -> None:
        self.model = model
        self.target: Any = target  # also an nn.Module, which is not in peft's type
        self.target_forward = target_forward
        self.layer_number = layer_number
        self.config = config
        carrier = getattr(model, "carrier", None)
        self.carrier = carrier if isinstance(carrier, ScalingsCarrier) else ScalingsCarrier()
        self.experts = StackedExperts(target, self.layout, allow_dora=config.allow_dora)
        self.dora = Dora(target, self.layout, self.base_rows, self.channel_axis)

    def prepare(self, *, own: bool = True) -> None:
        """Stack the experts if they are not stacked yet. Needed before a compiled call, which cannot do it.

        Args:
            own: as in `StackedExperts.refresh`.
        """
        self.experts.refresh(own=own)
        with torch.no_grad():
            for stack in self.experts.current:
                if stack.dora:
                    self.dora.factors(stack, stack.up)

    @staticmethod
    def apply_scalings_to_x(
        x: Float[Tensor, "*cells channel"], scalings_layer: Float[Tensor, "*#cells expert"], adapter: int
    ) -> Float[Tensor, "*cells channel"]:
        """x, multiplied by one expert's column of a layer's scalings."""
        return x * scalings_layer[..., adapter].unsqueeze(-1)

    def get_maybe_topk_scalings(
        self, scalings: Float[Tensor, "batch seq layer expert"]
    ) -> Float[Tensor, "batch seq expert"]:
        """This layer's scalings, after top-k and its softmax for each token if they are configured."""
        return keep_top_k(
            scalings[:, :, self.layer_number],
            self.config.top_k_lora,
            renormalise=self.config.enable_softmax_topk,
        )

    def forward(self, x: Tensor, *args: Any, scalings: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the mixture of the active experts.

        Args:
            x: the layer's input.
            *args: arguments of the base layer.
            scalings: the gate's output `[batch, seq, layer, expert]`; the expert axis has the order of the active
                adapters. None takes the scalings in the model's carrier; without these, each expert has weight 1.
            **kwargs: arguments of the base layer.

        Returns:
            The output, in the shape of the base layer's output.

        Raises:
            AdapterError: an active adapter uses DoRA and `allow_dora` is off, or another variant of LoRA.
            ValueError: the scalings do not fit the batch and the tokens of `x`.
            RuntimeError: the layer is recomputed in the backward pass without its scalings.
        """
        target = self.target
        merged = bool(target.merged_adapters)
        if target._disable_adapters and merged:
            target.unmerge()  # as in peft: if adapters are disabled, the base layer has its own weights
        result = target._modules["base_layer"](x, *args, **kwargs)
        dtype = self.output_dtype(x, result)
        carrier = self.carrier
        if target._disable_adapters or merged:
            return result.to(dtype)
        routing = carrier.routing
        if scalings is not None:
            routing, weights = None, self.get_maybe_topk_scalings(scalings)
        elif routing is not None:
            # Layers of other kinds have other positions than the weights, or another order.
            ready = routing.ready if routing.sees(self.layer_number) in _AS_THE_GATE else None
            stacks = self.experts.current
            # DecodeWeights has checked that the stacks are current, but a compiled graph may have earlier ones.
            if ready is not None and len(stacks) == 1 and ready.stacks[self.layer_number] is stacks[0]:
                sum_of_both = self.add_ready(result, x, stacks[0], ready)
                if sum_of_both is not None:
                    return sum_of_both if sum_of_both.dtype == dtype else sum_of_both.to(dtype)
            weights = routing.of_layer(self.layer_number)
        elif carrier.experts_off:
            return result.to(dtype)
        else:
            self._refuse_blind_recomputation()
            weights = None
        self._check_columns(weights)
        base_result = result
        for stack in self.experts.stacks():
            result = self._add_mixture(result, base_result, x, stack, weights, routing)
        return result.to(dtype)

    def _refuse_blind_recomputation(self) -> None:
        # In a backward pass, a layer without scalings is recomputed by gradient checkpointing that weft did not wrap.
        if not self.carrier.plain and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "an X-LoRA layer is recomputed in the backward pass without the scalings of its forward pass: use "
                "transformers' own gradient checkpointing (model.gradient_checkpointing_enable())"
            )

    def _check_columns(self, weights: Tensor | None) -> None:
        active = self.target.active_adapters
        if weights is not None and weights.shape[-1] != len(active):
            raise ValueError(
                f"the scalings are for {weights.shape[-1]} experts, but layer {self.layer_number} has {len(active)} "
                f"active adapters ({active}): the experts of a mixture cannot be changed one by one"
            )

    def _add_mixture(
        self,
        result: Tensor,
        base_result: Tensor,
        x: Tensor,
        stack: Stack,
        weights: Tensor | None,
        routing: Routing | None,
    ) -> Tensor:
        """result + Σ_e s_e · g · B_e(A_e(dropout(λ_e · x))) over the experts of one stack; for DoRA see `dora.py`."""
        down, up = self.experts.differentiable(stack)
        dora = self.dora.factors(stack, up) if stack.dora else None
        x = self.prepare_input(x, down.dtype)
        dropped = self.dropped_inputs(x, stack)
        h = self._down(x, dropped, stack, down)  # [batch, *cells, rank], the rank at channel_axis
        rank_axis = self.channel_axis % h.dim()
        scales = stack.scales.to(h.dtype)
        if weights is not None:
            if stack.column_index is not None:
                weights = weights.index_select(-1, stack.column_index.to(weights.device))
            weights = self._align(weights, h, rank_axis, routing)  # [batch, *cells, expert]
            if self.config.global_scaling_weight != 1:
                scales = scales * self.config.global_scaling_weight
            scales = weights.to(device=h.device, dtype=h.dtype) * scales
            if rank_axis != h.dim() - 1:
                scales = scales.movedim(-1, rank_axis)
        else:
            scales = scales.view(-1, *(1 for _ in range(rank_axis + 1, h.dim())))
        chosen_only = weights is not None and (routing is None or routing.some_left_out)
        h = scale_ranks(h, scales, stack.ranks, rank_axis, rank_expert=stack.rank_expert, chosen_only=chosen_only)
        result = self.add_up(result, h, up if dora is None else dora.up, stack)
        if dora is not None:
            plain = self.dora.plain(base_result) if dropped is None else self.dora.plain_of_each(dropped)
            result = result + dora.change_of_base(scales, scales.dim() - (h.dim() - rank_axis), plain)
        if stack.biased:
            result = self._add_biases(
                result, stack, 1.0 if weights is None else self.config.global_scaling_weight, routing
            )
        return result

    def _align(self, weights: Tensor, h: Tensor, rank_axis: int, routing: Routing | None) -> Tensor:
        sees = Sees.SAMPLE if routing is None else routing.sees(self.layer_number)
        transposed = sees in _TRANSPOSED
        if weights.shape[:2] == h.shape[:2] and h.dim() == 3 and rank_axis == 2 and not transposed:
            return weights  # one per token, the most frequent case
        batch, *cells = (size for axis, size in enumerate(h.shape) if axis != rank_axis)
        if transposed:
            batch, cells[0] = cells[0], batch
        try:
            if routing is None or sees is Sees.SAMPLE or not routing.per_token:
                padding = None if routing is None else routing.padding
                aligned = align_to_cells(weights, batch, tuple(cells), padding)
            else:
                padded = sees in (Sees.PADDED, Sees.PADDED_TRANSPOSED)
                aligned = align_to_tokens(weights, batch, tuple(cells), padded=padded)
        except ValueError as err:
            names = self.config.layer_names
            name = repr(names[self.layer_number]) if names else str(self.layer_number)
            raise ValueError(f"layer {name} sees something else than the text's tokens in this call: {err}") from err
        return aligned.transpose(0, 1) if transposed else aligned

    def dropped_inputs(self, x: Tensor, stack: Stack) -> list[Tensor] | None:
        """x after each expert's own dropout; None if no dropout is active."""
        # λ·dropout(x) = dropout(λ·x), so a separate product for each expert is needed only with dropout.
        dropouts = [self.target.lora_dropout[name] for name in stack.names] if self.target.training else []
        if not any(isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0 for dropout in dropouts):
            return None
        return [dropout(x) for dropout in dropouts]

    def _down(self, x: Tensor, dropped: list[Tensor] | None, stack: Stack, down: Tensor) -> Tensor:
        """h = A x for all experts at once, or for each expert separately if there are dropout masks."""
        if dropped is None:
            return self.down(x, down)
        parts = zip(dropped, down.split(stack.ranks), strict=True)
        return torch.cat([self.down(one, weight) for one, weight in parts], dim=self.channel_axis)

    def _add_biases(self, result: Tensor, stack: Stack, global_weight: float, routing: Routing | None) -> Tensor:
        """Add the `lora_bias` of the experts that have one.

        As B_e(z) = B z + b, the term s_e · g · b does not depend on λ. A row that uses a single expert gets only the
        bias of this expert.
        """
        of_rows = None if routing is None else routing.of_biases
        channels = self.channel_axis % result.dim()
        for name in stack.biased:
            bias = self.target.lora_B[name].bias * (self.target.scaling[name] * global_weight)
            bias = bias.view(-1, *(1 for _ in range(channels + 1, result.dim())))
            if of_rows is not None:
                column = of_rows[:, self.target.active_adapters.index(name)].to(bias)
                rows = int(routing is not None and routing.sees(self.layer_number) in _TRANSPOSED)  # the batch axis
                column = column.repeat_interleave(result.shape[rows] // len(column))
                bias = column.view(-1, *(1 for _ in result.shape[rows + 1 :])) * bias
            result = result + bias
        return result

    def add_ready(self, result: Tensor, x: Tensor, stack: Stack, ready: ReadyWeights) -> Tensor | None:
        """result + the mixture with precomputed rank weights; None if these do not fit `x`."""
        return None

    def output_dtype(self, x: Tensor, result: Tensor) -> torch.dtype:
        """The dtype of the layer's output."""
        return x.dtype

    def prepare_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The input of the experts, in their dtype."""
        return x.to(dtype)

    @abstractmethod
    def down(self, x: Tensor, weight: Tensor) -> Tensor:
        """A x; A has the rank as its first axis, and the result has the ranks at `channel_axis`."""

    @abstractmethod
    def add_up(self, result: Tensor, h: Tensor, up: Tensor, stack: Stack) -> Tensor:
        """result + B h, where `up` is B transposed; in the wider dtype of the two."""

    @abstractmethod
    def base_rows(self, weight: Tensor) -> Tensor:
        """The base layer's weight as a matrix W, [out, in]."""

"""What the layers follow in a pass, made of scalings: top-k, fixed weights, rows of a batch with an expert each.

Three kinds: one position of scalings for all tokens of a row, the gate's scalings token by token, and the constant
weight `scaling_pass_value` of the scaling pass and of layers before `gate_layer`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from weft.config import XLoraConfig
from weft.gate.routing import Sees, TopK, apply_top_k
from weft.layers.carrier import ReadyWeights, Routing
from weft.layers.decode_weights import DecodeWeights
from weft.passes.rows import RowScalings


class Routings:
    """Makes the `Routing` of each pass.

    Args:
        config: options, read at every call.
        first_layer: number of the first LoRA layer that follows the gate; those before have constant weights.
        kinds: what each LoRA layer sees.
        decode_weights: prepares what the layers need, where tokens are few.

    Attributes:
        fixed: scalings for every token, whatever the text is; None where there are none.
        rows: what each row of the batch in progress follows; None where all follow the gate.
    """

    def __init__(
        self, config: XLoraConfig, *, first_layer: int, kinds: tuple[Sees, ...], decode_weights: DecodeWeights
    ) -> None:
        self.config = config
        self.first_layer = first_layer
        self.kinds = kinds
        self.decode_weights = decode_weights
        self.fixed: Tensor | None = None
        self.rows: RowScalings | None = None

    def without_gate(self) -> Float[Tensor, "#batch #seq layer expert"] | None:
        """The scalings that the layers follow whatever the text is; None where the gate is to be asked."""
        return self.rows.constant() if self.rows is not None and self.rows.none_gated else self.fixed

    def top_k(
        self, scalings: Float[Tensor, "batch seq layer expert"]
    ) -> tuple[Float[Tensor, "batch seq layer expert"], TopK | None]:
        """The gate's scalings with top-k applied, and what was chosen; None where all are kept."""
        return apply_top_k(scalings, self.config.top_k_lora, renormalise=self.config.enable_softmax_topk)

    def mixed(self, scalings: Float[Tensor, "#row seq layer expert"]) -> Float[Tensor, "#row seq layer expert"]:
        """The gate's scalings with those of the rows that do not follow it."""
        return scalings if self.rows is None else self.rows.mixed_with(scalings)

    def of_biases(self) -> Float[Tensor, "row expert"] | None:
        """How much of each expert's `lora_bias` acts in each row; None for all of it."""
        return None if self.rows is None else self.rows.of_biases()

    def constant(self, device: torch.device) -> Routing:
        """Every expert acts with the weight `scaling_pass_value` everywhere."""
        # One position and one layer for all.
        constant = torch.full((1, 1, 1, self.config.num_experts), self.config.constant_weight, device=device)
        return self.of_rows(self.mixed(constant))

    def of_rows(self, scalings: Float[Tensor, "#row #seq layer expert"]) -> Routing:
        """One position for all tokens of a row."""
        return Routing(scalings, self._ready(scalings), kinds=self.kinds, per_token=False, of_biases=self.of_biases())

    def of_gate(
        self,
        scalings: Float[Tensor, "batch seq layer expert"],
        chosen: TopK | None,
        *,
        padding: Tensor | None,
        kept: slice | Tensor | None,
    ) -> Routing:
        """The gate's scalings token by token, but in rows that do not follow it.

        Args:
            scalings: top-k applied.
            chosen: by top-k; None for all.
            padding: the call's attention mask.
            kept: index of the tokens that layers of the kind `Sees.KEPT` see.
        """
        followed, ready = self.mixed(scalings), None
        if chosen is not None and self.rows is None:  # else it is not the gate alone that they follow
            weight = self.config.global_scaling_weight
            ready = self.decode_weights.of_chosen(chosen, self.config.num_experts, self.first_layer, weight)
        return Routing(
            followed,
            self._ready(followed, self.first_layer) if ready is None else ready,
            first_layer=self.first_layer,
            padding=padding,
            kinds=self.kinds,
            kept=kept,
            of_biases=self.of_biases(),
            some_left_out=self._some_left_out,
        )

    def with_constant_layers(
        self, scalings: Float[Tensor, "batch seq following expert"]
    ) -> Float[Tensor, "batch seq layer expert"]:
        """Scalings of the layers that follow the gate, after the constant weights of those before `first_layer`."""
        if self.first_layer == 0:
            return scalings
        batch, seq, _, num_experts = scalings.shape
        constant = scalings.new_full((batch, seq, self.first_layer, num_experts), self.config.constant_weight)
        return torch.cat([constant, scalings], dim=2)

    def _ready(self, scalings: Tensor, first_layer: int = 0) -> ReadyWeights | None:
        """What the layers can use as it is to follow these scalings, top-k applied."""
        weight = self.config.global_scaling_weight
        return self.decode_weights.per_rank(scalings, first_layer, weight, some_left_out=self._some_left_out)

    @property
    def _some_left_out(self) -> bool:
        chosen = self.fixed is not None or self.rows is not None
        return chosen or self.config.top_k_lora is not None

"""Makes the `Routing` that the layers use in a pass, from scalings: top-k, fixed weights, rows with one expert.

There are three kinds: scalings with one position for all tokens of a row; the gate's scalings of each token; and the
constant weight `scaling_pass_value`, in the scaling pass and in layers before `gate_layer`.
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
        config: options, read in each call.
        first_layer: number of the first LoRA layer that uses the gate's scalings; those before have constant weights.
        kinds: kind of input of each LoRA layer.
        decode_weights: computes the rank weights for short inputs.

    Attributes:
        fixed: fixed scalings for all tokens, or None.
        rows: the weights of the rows that do not use the gate; None if all rows use it.
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
        """The scalings if they do not depend on the text; None if the gate must run."""
        return self.rows.constant() if self.rows is not None and self.rows.none_gated else self.fixed

    def top_k(
        self, scalings: Float[Tensor, "batch seq layer expert"]
    ) -> tuple[Float[Tensor, "batch seq layer expert"], TopK | None]:
        """The gate's scalings after top-k, and the chosen experts; None if all are kept."""
        return apply_top_k(scalings, self.config.top_k_lora, renormalise=self.config.enable_softmax_topk)

    def mixed(self, scalings: Float[Tensor, "#row seq layer expert"]) -> Float[Tensor, "#row seq layer expert"]:
        """The gate's scalings, replaced in the rows that do not use the gate."""
        return scalings if self.rows is None else self.rows.mixed_with(scalings)

    def of_biases(self) -> Float[Tensor, "row expert"] | None:
        """The factor of each expert's `lora_bias` in each row; None for 1."""
        return None if self.rows is None else self.rows.of_biases()

    def constant(self, device: torch.device) -> Routing:
        """Each expert has the weight `scaling_pass_value` for all tokens and layers."""
        # One position and one layer, which are used for all.
        constant = torch.full((1, 1, 1, self.config.num_experts), self.config.constant_weight, device=device)
        return self.of_rows(self.mixed(constant))

    def of_rows(self, scalings: Float[Tensor, "#row #seq layer expert"]) -> Routing:
        """Scalings with one position for all tokens of a row."""
        return Routing(scalings, self._ready(scalings), kinds=self.kinds, per_token=False, of_biases=self.of_biases())

    def of_gate(
        self,
        scalings: Float[Tensor, "batch seq layer expert"],
        chosen: TopK | None,
        *,
        padding: Tensor | None,
        kept: slice | Tensor | None,
    ) -> Routing:
        """The gate's scalings of each token, replaced in the rows that do not use the gate.

        Args:
            scalings: the scalings after top-k.
            chosen: the experts that top-k has chosen; None for all.
            padding: the call's attention mask.
            kept: index of the tokens in the input of layers of the kind `Sees.KEPT`.
        """
        followed, ready = self.mixed(scalings), None
        if chosen is not None and self.rows is None:  # with rows, the scalings are not only those of top-k
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
        """Add the constant weights of the layers before `first_layer` to scalings of the layers from there on."""
        if self.first_layer == 0:
            return scalings
        batch, seq, _, num_experts = scalings.shape
        constant = scalings.new_full((batch, seq, self.first_layer, num_experts), self.config.constant_weight)
        return torch.cat([constant, scalings], dim=2)

    def _ready(self, scalings: Tensor, first_layer: int = 0) -> ReadyWeights | None:
        """The precomputed rank weights for scalings after top-k; None if the layers should compute them."""
        weight = self.config.global_scaling_weight
        return self.decode_weights.per_rank(scalings, first_layer, weight, some_left_out=self._some_left_out)

    @property
    def _some_left_out(self) -> bool:
        chosen = self.fixed is not None or self.rows is not None
        return chosen or self.config.top_k_lora is not None

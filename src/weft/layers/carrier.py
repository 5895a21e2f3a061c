"""The object that passes the scalings of a call from the model to its layers.

Each model has one `ScalingsCarrier`. A pass sets a `Routing` in it, the layers read it, and the pass removes it at the
end. Copies and pickles of a model start with an empty carrier.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor

from weft.gate.routing import Sees


@dataclasses.dataclass(frozen=True)
class ReadyWeights:
    """λ · s · g of each rank, for the layers of a pass over few tokens; of all experts or of the chosen ones.

    Attributes:
        stacks: layer number -> the stacked experts of the weights; None for a layer that computes its own weights.
        tokens: (batch, seq) of the input; None if one row of weights is used for all tokens.
        first_layer: number of the first layer in `weights` and `chosen`.
        weights: layer -> `[token, rank]`: all ranks, or those of the chosen experts.
        chosen: layer -> the indices of these ranks in the stack, `[token * rank]`; None for all ranks.
        left_out: layer -> `[token, rank]`, True for weights of exactly 0, whose A x must be ignored; None for no rank.
    """

    stacks: tuple[Any, ...]
    tokens: tuple[int, ...] | None
    first_layer: int
    weights: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...] | None = None
    left_out: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Routing:
    """The scalings of one pass, after top-k.

    Attributes:
        scalings: λ of each token, layer and expert; a layer axis of 1 is shared by all layers.
        ready: precomputed rank weights for short inputs, or None.
        first_layer: number of the first layer in the layer axis.
        padding: attention mask of the pass, for means over the sequence; None if there is no padding.
        kinds: layer number -> kind of input; empty if that is not known.
        kept: index into the sequence axis for layers whose input has only the kept tokens; None for all tokens.
        per_token: False if the scalings are the same for all tokens of a row.
        of_biases: factor of each expert's `lora_bias` in each row; None for 1.
        some_left_out: a scaling of 0 means that the expert was not chosen, so its A x is ignored even if it is infinite
            (0 · inf would be NaN). False if the gate gives each expert a share.
    """

    scalings: Float[Tensor, "batch seq layer expert"]
    ready: ReadyWeights | None = None
    first_layer: int = 0
    padding: Shaped[Tensor, "batch total"] | None = None
    kinds: tuple[Sees, ...] = ()
    kept: slice | Tensor | None = None
    per_token: bool = True
    of_biases: Float[Tensor, "row expert"] | None = None
    some_left_out: bool = True
    _per_layer: tuple[Tensor, ...] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        # One unbind for all layers: its backward is a single stack. The backward of a slice per layer would allocate a
        # zero tensor of the full size each time.
        object.__setattr__(self, "_per_layer", self.scalings.unbind(2))

    def of_layer(self, layer_number: int) -> Float[Tensor, "batch seq expert"]:
        """λ for one LoRA layer."""
        shared = len(self._per_layer) == 1
        scalings = self._per_layer[0 if shared else layer_number - self.first_layer]
        kept_only = self.kept is not None and self.per_token and self.sees(layer_number) is Sees.KEPT
        return scalings[:, self.kept] if kept_only else scalings

    def sees(self, layer_number: int) -> Sees:
        """The kind of input of one LoRA layer."""
        return self.kinds[layer_number] if self.kinds else Sees.SAMPLE


class ScalingsCarrier:
    """The state of the present pass, for the layers of one model.

    Attributes:
        routing: the scalings of the pass; None outside of a pass, where each expert has weight 1.
        experts_off: True if the experts are left out (in a scaling pass with `scaling_pass_value` 0).
        in_scaling_pass: True during a scaling pass.
        plain: True while gradient checkpointing recomputes a block whose forward had no scalings.
    """

    routing: Routing | None
    experts_off: bool
    in_scaling_pass: bool
    plain: bool

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Reset the state, at the end of a pass."""
        self.routing = None
        self.experts_off = False
        self.in_scaling_pass = False
        self.plain = False

    @contextmanager
    def scaling_pass(self, routing: Routing | None) -> Iterator[None]:
        """In this block the layers use `routing`; if it is None, they leave the experts out."""
        before = self.routing, self.experts_off, self.in_scaling_pass
        self.routing, self.experts_off, self.in_scaling_pass = routing, routing is None, True
        try:
            yield
        finally:
            self.routing, self.experts_off, self.in_scaling_pass = before

    @contextmanager
    def following(self, routing: Routing | None) -> Iterator[None]:
        """In this block the layers use `routing`; if it is None, each expert has weight 1."""
        before = self.routing, self.plain
        self.routing, self.plain = routing, routing is None
        try:
            yield
        finally:
            self.routing, self.plain = before

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.clear()

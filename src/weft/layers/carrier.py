"""What carries the scalings from the model to its layers: one object per model, no globals, no hooks per call.

The model's pass puts a `Routing` into its `ScalingsCarrier`, the layers read it, the pass takes it out again. The
carrier knows nothing of gates or layers, and what it holds is of the moment: copies and pickles of a model start empty.
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
    """λ · s · g for the layers of a pass over few tokens: either per rank, or of the experts that the tokens chose.

    Attributes:
        stacks: by layer number, the stacked experts that the weights are for; None where a layer computes its own.
        tokens: (batch, seq) of the input that they are for; None for any, which one row of weights is for.
        first_layer: number of the layer that `weights` and `chosen` begin with.
        weights: by layer, `[token, rank]` each: of all ranks, or of those of the chosen experts.
        chosen: by layer, which ranks of the stack, `[token * rank]` each; None for all.
        left_out: by layer, `[token, rank]` each, whose weight is exactly 0, whatever A x is; None where that is nobody.
    """

    stacks: tuple[Any, ...]
    tokens: tuple[int, ...] | None
    first_layer: int
    weights: tuple[Tensor, ...]
    chosen: tuple[Tensor, ...] | None = None
    left_out: tuple[Tensor, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Routing:
    """The scalings of one adapted pass, top-k applied.

    Attributes:
        scalings: λ per token, layer and expert; a layer axis of 1 is shared by all layers.
        ready: what the layers can use as it is, where the tokens are few; or None.
        first_layer: number of the layer that the layer axis begins with.
        padding: the pass's attention mask, or None: which tokens count in a mean over the sequence.
        kinds: what each layer sees, by its number; empty where that is not known.
        kept: index into the sequence axis for layers that see the kept tokens only; None for all of them.
        per_token: whether the scalings differ from token to token, rather than hold for all of a row.
        of_biases: how much of each expert's `lora_bias` acts in each row; None for all of it.
        some_left_out: a scaling of 0 means that an expert was not chosen, and is not heard even where its A x has
            overflowed (0 · inf would be NaN); False where the gate gives each expert a share.
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
        # One unbind for all layers: its backward is one stack, where a slice per layer would each time fill a zero
        # tensor of the full size.
        object.__setattr__(self, "_per_layer", self.scalings.unbind(2))

    def of_layer(self, layer_number: int) -> Float[Tensor, "batch seq expert"]:
        """λ for one LoRA layer."""
        shared = len(self._per_layer) == 1
        scalings = self._per_layer[0 if shared else layer_number - self.first_layer]
        kept_only = self.kept is not None and self.per_token and self.sees(layer_number) is Sees.KEPT
        return scalings[:, self.kept] if kept_only else scalings

    def sees(self, layer_number: int) -> Sees:
        """What one LoRA layer sees."""
        return self.kinds[layer_number] if self.kinds else Sees.SAMPLE


class ScalingsCarrier:
    """Holds what the layers of one model need to know about the pass in progress.

    Attributes:
        routing: the scalings of the pass, or None outside an adapted pass (then every expert has weight 1).
        experts_off: True while the experts must not act at all (the scaling pass with `scaling_pass_value` 0).
        in_scaling_pass: True while the model reads the text for the gate.
        plain: True while a block is recomputed that ran without scalings the first time, too.
    """

    routing: Routing | None
    experts_off: bool
    in_scaling_pass: bool
    plain: bool

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget the pass in progress."""
        self.routing = None
        self.experts_off = False
        self.in_scaling_pass = False
        self.plain = False

    @contextmanager
    def scaling_pass(self, routing: Routing | None) -> Iterator[None]:
        """The layers follow `routing`, or leave the experts out where it is None, until the block ends."""
        before = self.routing, self.experts_off, self.in_scaling_pass
        self.routing, self.experts_off, self.in_scaling_pass = routing, routing is None, True
        try:
            yield
        finally:
            self.routing, self.experts_off, self.in_scaling_pass = before

    @contextmanager
    def following(self, routing: Routing | None) -> Iterator[None]:
        """The layers follow `routing`, or mix at weight 1 where it is None, until the block ends."""
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

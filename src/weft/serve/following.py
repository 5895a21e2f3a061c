"""The gate in an engine, and the scalings that the layers use at present.

The tokens of all requests are in one axis. Scalings are [token, layer, expert]; a token or layer axis of 1 is for all.
The options of a request (choices.py) replace the gate's scalings of its tokens, or change their top-k or weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.gate.routing import keep_each_top_k, keep_top_k, softmax_with_temperature
from weft.serve.mixture import ServedMixture

if TYPE_CHECKING:  # it needs vLLM
    from weft.serve.choices import Choices


class Following(nn.Module):
    """The gate of a mixture, and the scalings of the present pass.

    Args:
        mixture: the mixture.
        choices: the options of the requests in the batch.
        dtype: dtype of the model.

    Attributes:
        of_layers: λ · g for each of the engine's layers, [token, slice * expert, 1], in the model's dtype; None if the
            experts are left out.
        of_biases: factor of each expert's `lora_bias`, [token, expert]; None if it is g for all.
        in_scaling_pass: whether the scaling pass runs, in which the gate's own LoRA acts.
    """

    _constant: Tensor

    def __init__(self, mixture: ServedMixture, choices: Choices, dtype: torch.dtype) -> None:
        super().__init__()
        self.options = mixture.options
        self.choices = choices
        self.num_layers, self.num_experts = len(mixture.layers), len(mixture.experts)
        self.first_layer = mixture.following().start
        self.dtype = dtype
        self.of_layers: tuple[Tensor, ...] | None = None
        self.of_biases: Tensor | None = None
        self.in_scaling_pass = False
        self._widths: list[int] = []
        self._order: Tensor | None = None
        self._depth = len(mixture.gate)
        for number, (weight, bias) in enumerate(mixture.gate):
            self.register_buffer(f"weight_{number}", weight, persistent=False)
            self.register_buffer(f"bias_{number}", bias, persistent=False)
        self.constant_weight = float(mixture.options.get("scaling_pass_value") or 0.0)
        constant = torch.full((1, 1, self.num_experts), self.constant_weight)
        self.register_buffer("_constant", constant, persistent=False)

    def arrange(self, layers: list[list[int]]) -> None:
        """Set the engine's layers, each with the numbers of its LoRA layers: the order of `of_layers`."""
        numbers = [number for of in layers for number in of]
        self._widths = [len(of) * self.num_experts for of in layers]
        if numbers != list(range(self.num_layers)):
            self._order = torch.tensor(numbers, device=self._constant.device)

    def read(self, num_tokens: int) -> None:
        """Begin a scaling pass."""
        self.in_scaling_pass = True
        self._use_constant(num_tokens)

    def _use_constant(self, num_tokens: int) -> None:
        """Give each expert the weight `scaling_pass_value`."""
        self.of_layers = self.of_biases = None
        if not self.constant_weight:
            return
        if not self.choices.active:
            self._follow(self._constant * self.choices.own_weight)
            return
        weight = self.choices.of_tokens("weight", num_tokens)
        self._follow(self._constant * weight[:, None])
        self.of_biases = weight.expand(-1, self.num_experts)

    def begin(self, num_tokens: int) -> None:
        """Set the scalings of the layers before the gate, with `gate_layer`."""
        if not self.choices.active:
            self._use_constant(num_tokens)
            return
        scalings, biases = self._chosen(self._constant.expand(num_tokens, -1, -1))
        self._follow(scalings)
        out = not self.constant_weight  # then rows with the gate have no experts and no biases in these layers
        self.of_biases = biases * ~self.choices.of_tokens("gated", num_tokens) if out else biases

    def ask(self, hidden: Float[Tensor, "token hidden"], *, normalise: bool) -> None:
        """Run the gate on `hidden`, and set λ · g after top-k, with constant weights in layers before the gate."""
        self.in_scaling_pass = False
        scalings = self._top_k(self._gate(hidden.to(torch.float32), normalise=normalise))
        if self.first_layer:
            before = self._constant.expand(len(scalings), self.first_layer, -1)
            if scalings.shape[1] == 1:
                scalings = scalings.expand(-1, self.num_layers - self.first_layer, -1)
            scalings = torch.cat([before, scalings], 1)
        shares = scalings.mean(1)
        self.of_biases = None
        if self.choices.active:
            scalings, self.of_biases = self._chosen(scalings)
            gated, fixed = (self.choices.of_tokens(name, len(shares)) for name in ("gated", "fixed"))
            shares = torch.where(gated, shares, fixed)
        else:
            scalings = scalings * self.choices.own_weight
        self._follow(scalings)
        self.choices.shares[: len(shares)].copy_(shares)

    def end(self) -> None:
        """Reset the scalings."""
        self.of_layers = self.of_biases = None

    def _follow(self, scalings: Float[Tensor, "token layer expert"]) -> None:
        """Split the scalings into one tensor per layer, so that equal layers have equal graphs."""
        if scalings.shape[1] == 1:
            scalings = scalings.expand(-1, self.num_layers, -1)
        if self._order is not None:
            scalings = scalings[:, self._order]
        self.of_layers = scalings.to(self.dtype).flatten(1)[..., None].split(self._widths, 1)

    def _gate(self, hidden: Float[Tensor, "token hidden"], *, normalise: bool) -> Float[Tensor, "token layer expert"]:
        if normalise:
            hidden = F.rms_norm(hidden, hidden.shape[-1:])
        for number in range(self._depth):
            hidden = F.relu(hidden) if number else hidden
            hidden = F.linear(hidden, getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}"))
        scalings = hidden.view(hidden.shape[0], -1, self.num_experts)
        if self.options.get("enable_softmax", True):
            scalings = softmax_with_temperature(scalings, self.options.get("softmax_temperature", 1.0))
        return scalings

    def _top_k(self, scalings: Float[Tensor, "token layer expert"]) -> Float[Tensor, "token layer expert"]:
        renormalise = self.options.get("enable_softmax_topk", False)
        if not self.choices.active:
            return keep_top_k(scalings, self.options.get("top_k_lora"), renormalise=renormalise)
        kept = self.choices.of_tokens("kept", len(scalings))
        return keep_each_top_k(scalings, kept[:, None], renormalise=renormalise)

    def _chosen(
        self, scalings: Float[Tensor, "token layer expert"]
    ) -> tuple[Float[Tensor, "token layer expert"], Float[Tensor, "token expert"]]:
        """(λ · g, factors of the biases) with the options of the requests."""
        names = ("gated", "fixed", "weight", "biased")
        gated, fixed, weight, biased = (self.choices.of_tokens(name, len(scalings)) for name in names)
        return torch.where(gated[:, None], scalings, fixed[:, None]) * weight[:, None], biased

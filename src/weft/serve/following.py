"""The gate inside an engine, and what the adapted layers follow at a moment.

Tokens of all requests lie in one row: scalings are [token, layer, expert], 1 token or layer standing for all. What a
request has chosen (choices.py) takes the gate's place, or changes how it decides, for its own tokens.
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
    """The gate of a mixture, and the scalings that the layers follow in the pass under way.

    Attributes:
        of_layers: λ · g of the pass for each of the engine's layers, [token, slice * expert, 1], in the model's dtype;
            None where the experts are left out.
        of_biases: how much of each expert's `lora_bias` acts, [token, expert]; None where it is g for all.

    Args:
        mixture: read from its folder.
        choices: of the requests in the batch.
        dtype: of the model.
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
        """Take up the engine's layers, each with its LoRA layers: `of_layers` is in their order."""
        numbers = [number for of in layers for number in of]
        self._widths = [len(of) * self.num_experts for of in layers]
        if numbers != list(range(self.num_layers)):
            self._order = torch.tensor(numbers, device=self._constant.device)

    def read(self, num_tokens: int) -> None:
        """Follow what a scaling pass follows."""
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
        """Follow what the layers before the one that the gate reads at follow."""
        if not self.choices.active:
            self.read(num_tokens)
            return
        scalings, biases = self._chosen(self._constant.expand(num_tokens, -1, -1))
        self._follow(scalings)
        out = not self.constant_weight  # for texts that the gate will decide for, biases and all
        self.of_biases = biases * ~self.choices.of_tokens("gated", num_tokens) if out else biases

    def ask(self, hidden: Float[Tensor, "token hidden"], *, normalise: bool) -> None:
        """Follow λ · g of each token, top-k applied; constant weights before the layer that the gate reads at."""
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
        """Nothing is followed any more."""
        self.of_layers = self.of_biases = None

    def _follow(self, scalings: Float[Tensor, "token layer expert"]) -> None:
        """Give each layer its own tensor: at once, and so that the graphs of equal layers are equal."""
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
        """λ · g and how much of the biases acts, where requests have chosen what is followed."""
        names = ("gated", "fixed", "weight", "biased")
        gated, fixed, weight, biased = (self.choices.of_tokens(name, len(scalings)) for name in names)
        return torch.where(gated[:, None], scalings, fixed[:, None]) * weight[:, None], biased

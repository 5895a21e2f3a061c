"""The gate inside an engine, and what the adapted layers follow at a moment.

Tokens of all requests lie in one row: scalings are [token, layer, expert], 1 token or layer standing for all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from weft.routing import keep_top_k, softmax_with_temperature
from weft.serve.mixture import ServedMixture


class Following(nn.Module):
    """The gate of a mixture, and the scalings that the layers follow in the pass under way.

    Attributes:
        scalings: λ · g of the pass; None where the experts are left out.

    Args:
        mixture: read from its folder.
    """

    def __init__(self, mixture: ServedMixture) -> None:
        super().__init__()
        self.options = mixture.options
        self.num_layers, self.num_experts = len(mixture.layers), len(mixture.experts)
        self.first_layer = mixture.following().start
        self.global_weight = float(mixture.options.get("global_scaling_weight", 1.0))
        self.scalings: Tensor | None = None
        self._constant: Tensor
        self._depth = len(mixture.gate)
        for number, (weight, bias) in enumerate(mixture.gate):
            self.register_buffer(f"weight_{number}", weight, persistent=False)
            self.register_buffer(f"bias_{number}", bias, persistent=False)
        value = float(mixture.options.get("scaling_pass_value") or 0.0)
        self.constant_weight = value
        constant = torch.full((1, 1, self.num_experts), value)
        self.register_buffer("_constant", constant, persistent=False)

    def constant(self) -> Float[Tensor, "1 1 expert"] | None:
        """What the layers follow where the gate has not decided yet; None where the experts are left out."""
        return self._constant * self.global_weight if self.constant_weight else None

    def ask(self, hidden: Float[Tensor, "token hidden"], *, normalise: bool) -> Float[Tensor, "token layer expert"]:
        """λ · g of each token, top-k applied; constant weights before the layer that the gate reads at."""
        hidden = hidden.to(torch.float32)
        if normalise:
            hidden = F.rms_norm(hidden, hidden.shape[-1:])
        for number in range(self._depth):
            hidden = F.relu(hidden) if number else hidden
            hidden = F.linear(hidden, getattr(self, f"weight_{number}"), getattr(self, f"bias_{number}"))
        scalings = hidden.view(hidden.shape[0], -1, self.num_experts)
        if self.options.get("enable_softmax", True):
            scalings = softmax_with_temperature(scalings, self.options.get("softmax_temperature", 1.0))
        scalings = keep_top_k(
            scalings, self.options.get("top_k_lora"), renormalise=self.options.get("enable_softmax_topk", False)
        )
        if self.first_layer:
            before = self._constant.expand(len(scalings), self.first_layer, -1)
            if scalings.shape[1] == 1:
                scalings = scalings.expand(-1, self.num_layers - self.first_layer, -1)
            scalings = torch.cat([before, scalings], 1)
        return scalings * self.global_weight

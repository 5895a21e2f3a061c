"""A LoRA of the gate's own, which acts in the scaling pass only: the gate then reads states that were made for it.

    h = W x + B A x        in each linear layer of the scaling pass (arXiv 2106.09685, equation 3, at a scaling of 1)

The hidden states of a base model tell of the next token, not of the domain of the text. With this LoRA the attention of
the scaling pass collects what was read so far for the gate, and the scaling pass's KV cache keeps it. It is trained by
the gate's fit (`train/scaling_fit.py`). In the adapted pass the base model is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LowRank(nn.Module):
    """The product B A x, which is 0 at first.

    Args:
        inputs: width of x.
        outputs: width of the product.
        rank: rank of B A.
        device: device of the parameters.
        dtype: dtype of the parameters, in which the products are computed.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs, device=device, dtype=dtype) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=device, dtype=dtype))

    def forward(self, x: Float[Tensor, "*token in"]) -> Float[Tensor, "*token out"]:
        """B A x, on the device of the parameters."""
        x = x.to(self.down.device, self.down.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(functional.linear(x, self.down), self.up)


class ScalingPassLora(nn.Module):
    """The LoRA of the scaling pass; its parameters have the names of the layers, `{layer}.down` and `{layer}.up`.

    Args:
        widths: name of each linear layer -> (width of its input, width of its output).
        rank: the rank, in each layer.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Example:
        >>> lora = ScalingPassLora({"layers.0.up_proj": (64, 128)}, 8, device=torch.device("cpu"), dtype=torch.float32)
        >>> lora.get_submodule("layers.0.up_proj")(torch.randn(5, 64)).shape  # torch.Size([5, 128])
    """

    def __init__(
        self, widths: Mapping[str, tuple[int, int]], rank: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__()
        for name, (inputs, outputs) in widths.items():
            *path, last = name.split(".")
            parent: nn.Module = self
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, LowRank(inputs, outputs, rank, device=device, dtype=dtype))

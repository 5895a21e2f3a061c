"""The gate: it computes one scaling per token, LoRA layer and expert from hidden states.

Its parameters are named `layers.{i}.weight` and `layers.{i}.bias`, with the indices of peft's X-LoRA classifier, so
that weights can be exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from weft.base_model.devices import memory_of
from weft.config import XLoraConfig
from weft.errors import ConfigError
from weft.gate.routing import softmax_with_temperature
from weft.gate.scaling_lora import ScalingPassLora


def _refuse_too_large(
    config: XLoraConfig,
    outputs: int,
    scaling_pass_widths: Mapping[str, tuple[int, int]] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise if a gate of these sizes is larger than the device's memory, as the system might kill the process."""
    assert config.hidden_size is not None
    depth, size = config.xlora_depth, config.xlora_size
    weights = config.hidden_size * outputs if depth == 1 else size * (config.hidden_size + (depth - 2) * size + outputs)
    sizes = {f"xlora_depth ({depth}) and xlora_size ({size}) make a gate": weights}
    if scaling_pass_widths is not None and config.scaling_pass_rank is not None:
        rank, channels = config.scaling_pass_rank, sum(map(sum, scaling_pass_widths.values()))
        sizes[f"scaling_pass_rank ({rank}) makes a LoRA"] = rank * channels
    there = memory_of(device)
    for what, number in sizes.items():
        needed = number * dtype.itemsize
        if there is not None and needed > there:
            raise ConfigError(
                f"{what} of {number:,} weights, {needed / 1e9:,.1f} GB, and {device} has {there / 1e9:,.1f} GB: "
                "expected smaller ones"
            )


class XLoraClassifier(nn.Module):
    """Predict the scalings λ from the hidden states of the scaling pass (arXiv 2402.07148, section 2.1).

        λ = softmax(W_d ... ReLU(W_1 h) / temperature)        depth d; without softmax when `enable_softmax` is False

    Args:
        config: `hidden_size` must be set; uses `xlora_depth`, `xlora_size`, `xlora_dropout_p`, `layerwise_scalings`,
            `enable_softmax` and `softmax_temperature`.
        num_experts: number of experts.
        num_layers: number of LoRA layers in the model (not decoder layers).
        device: device of the parameters; the mixture uses the adapters' device.
        dtype: dtype of the parameters. The mixture uses float32, or float64 for a float64 base model. Hidden states are
            cast to it. The softmax runs in float32 or wider, which is the dtype of λ.
        scaling_pass_widths: name of each linear layer of the scaling pass -> (input, output) width, for the gate's own
            LoRA in it, `scaling_pass_lora`; None without `scaling_pass_rank`.

    Raises:
        ConfigError: a gate of these sizes does not fit into the device's memory.
        ValueError: `hidden_size` is None.

    Example:
        >>> config = XLoraConfig(hidden_size=64, adapters={"math": "adapters/math", "code": "adapters/code"})
        >>> gate = XLoraClassifier(config, num_experts=2, num_layers=14)
        >>> gate(torch.randn(1, 5, 64)).shape  # torch.Size([1, 5, 14, 2])
    """

    def __init__(
        self,
        config: XLoraConfig,
        num_experts: int,
        num_layers: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        scaling_pass_widths: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = num_experts
        self.num_layers = num_layers
        if config.hidden_size is None:
            raise ValueError("hidden_size (None) must be the size of the hidden states that the gate reads")

        outputs = num_experts * (num_layers if config.layerwise_scalings else 1)
        _refuse_too_large(config, outputs, scaling_pass_widths, torch.device(device or "cpu"), dtype)
        width = config.hidden_size
        layers: list[nn.Module] = []
        for _ in range(config.xlora_depth - 1):
            layers += [nn.Linear(width, config.xlora_size, device=device, dtype=dtype), nn.ReLU()]
            if config.xlora_dropout_p > 0:
                layers.append(nn.Dropout(config.xlora_dropout_p))
            width = config.xlora_size
        layers.append(nn.Linear(width, outputs, device=device, dtype=dtype))
        self.layers = nn.Sequential(*layers)
        if scaling_pass_widths is not None:
            assert config.scaling_pass_rank is not None
            where = next(self.parameters()).device
            self.scaling_pass_lora = ScalingPassLora(
                scaling_pass_widths, config.scaling_pass_rank, device=where, dtype=dtype
            )
            self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> XLoraClassifier:
        """As in torch, but the LoRA of the scaling pass stays frozen: only `fit_gate` trains it."""
        super().requires_grad_(requires_grad)
        if self.config.scaling_pass_rank is not None:
            self.scaling_pass_lora.requires_grad_(False)
        return self

    @property
    def override_scaling_pass_value(self) -> float:
        """peft's name for `config.scaling_pass_value`, the weight of each expert in the scaling pass."""
        return self.config.constant_weight

    def forward(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq layer expert"]:
        """Compute λ for each LoRA layer.

        Args:
            hidden: hidden states, `hidden_size` wide.

        Returns:
            λ. If `layerwise_scalings` is off, the layer axis is an expanded view of one set.

        Raises:
            ValueError: the width of the hidden states is not `hidden_size`.
        """
        first = self.layers[0]
        assert isinstance(first, nn.Linear)
        batch, seq, width = hidden.shape
        if width != first.in_features:
            raise ValueError(
                f"hidden_size ({first.in_features}) must be the width of the base model's last hidden state ({width})"
            )
        with torch.autocast(hidden.device.type, enabled=False):  # half precision would change which experts are chosen
            logits = self.layers(hidden.to(first.weight.dtype)).view(batch, seq, -1, self.num_experts)
        if self.config.enable_softmax:
            logits = softmax_with_temperature(logits, self.config.softmax_temperature)
        return logits.expand(batch, seq, self.num_layers, self.num_experts)

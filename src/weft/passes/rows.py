"""Batches with rows that use one expert (peft's `adapter_names`) and rows that use the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from weft.errors import ConfigError
from weft.files.names import NO_EXPERT


@dataclass(frozen=True)
class RowScalings:
    """The weights of each row of a batch.

    Attributes:
        weights: λ of the rows that use one expert or none, so that λ · g is 1 or 0.
        gated: True for rows that use the gate.
    """

    weights: Float[Tensor, "row expert"]
    gated: Bool[Tensor, " row"]

    @property
    def none_gated(self) -> bool:
        """Whether no row uses the gate."""
        return not bool(self.gated.any())

    def of_batch(self, batch: int) -> RowScalings:
        """The same for a batch in which each row is repeated, for example for beams.

        Raises:
            ConfigError: the batch size is not a multiple of the number of rows.
        """
        rows = len(self.gated)
        if batch == rows:
            return self
        if batch % rows:
            raise ConfigError(f"adapter_names has {rows} names, expected {batch}: one for each row of the batch")
        times = batch // rows
        return RowScalings(self.weights.repeat_interleave(times, 0), self.gated.repeat_interleave(times, 0))

    def constant(self) -> Float[Tensor, "row 1 1 expert"]:
        """The weights as scalings with one position and one layer."""
        return self.weights[:, None, None]

    def mixed_with(self, scalings: Float[Tensor, "#row seq layer expert"]) -> Float[Tensor, "row seq layer expert"]:
        """These scalings in the rows that use the gate, and the weights in the others."""
        return torch.where(self.gated[:, None, None, None], scalings, self.constant().to(scalings.dtype))

    def of_biases(self) -> Float[Tensor, "row expert"]:
        """The factor of each expert's `lora_bias`, without g; 1 in rows that use the gate."""
        return torch.where(self.gated[:, None], torch.ones_like(self.weights), self.weights)


def rows_of_names(
    names: Sequence[str], expert_names: Sequence[str], mixture: str, global_weight: float, device: torch.device
) -> RowScalings:
    """The `RowScalings` for peft's `adapter_names`.

    Args:
        names: for each row, the name of an expert, `__base__` for no expert, or the name of the mixture.
        expert_names: the experts in the order of the gate's outputs.
        mixture: peft's name of the mixture, whose rows use the gate.
        global_weight: the global weight g, which does not apply to rows with a single expert.
        device: device of the weights.

    Raises:
        ConfigError: a name is unknown, or g is 0, so that λ · g cannot be 1.
    """
    unknown = sorted({str(name) for name in names} - {*expert_names, NO_EXPERT, mixture})
    if unknown or not names:
        known = [*expert_names, NO_EXPERT, mixture]
        raise ConfigError(f"adapter_names has {unknown}, expected one of {known} for each row of the batch")
    single = [name for name in names if name in expert_names]
    if single and global_weight == 0:
        raise ConfigError(f"adapter_names has {single[0]!r}, but global_scaling_weight (0) leaves all experts out")
    weights = torch.zeros(len(names), len(expert_names))
    for row, name in enumerate(names):
        if name in expert_names:
            weights[row, list(expert_names).index(name)] = 1 / global_weight
    return RowScalings(weights.to(device), torch.tensor([name == mixture for name in names], device=device))

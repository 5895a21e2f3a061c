"""Checks, before training, that a model separates the texts of a packed row (see `weft.data.packing`).

This depends on its architecture and its attention implementation. A recurrent model keeps its state, for example.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.base_model.state import in_evaluation_mode
from weft.errors import ConfigError

# Number of tokens of the first and the second text in a row.
_BEFORE, _BEHIND = 6, 9


def check_packing(model: Any, batch_size: int) -> None:
    """Raise if the texts of a row would see each other.

    Compares the base model's hidden states of a text after two different texts, and alone.

    Args:
        model: a mixture from `weft.from_adapters` or `weft.from_pretrained`.
        batch_size: rows per batch; attention implementations can differ for a single row.

    Raises:
        ConfigError: this model cannot be trained on packed texts.
    """
    passes = model.passes
    backbone = passes.backbone
    name, attention = type(backbone.base).__name__, backbone.base.config._attn_implementation
    if backbone.is_encoder_decoder or not backbone.takes("position_ids"):
        raise ConfigError(
            f"packing (True) needs a base model that takes position_ids, by which it tells texts apart; {name} does "
            "not: leave packing out, group_by_length saves padding too"
        )
    vocabulary = backbone.base.get_input_embeddings().weight
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(len(vocabulary), (2, _BEFORE + _BEHIND), generator=draws).to(vocabulary.device)
    ids[:, _BEFORE:] = ids[0, _BEFORE:]
    positions = torch.cat([torch.arange(_BEFORE), torch.arange(_BEHIND)]).to(ids.device)
    with in_evaluation_mode(backbone.base):
        rows = [ids] if batch_size > 1 else [ids[:1], ids[1:]]
        read = [_read(passes, row, positions.expand(len(row), -1)) for row in rows]
        one, other = torch.cat(read)[:, _BEFORE:]
        alone = _read(passes, ids[:1, _BEFORE:], positions[None, _BEFORE:])[0]
    # Tolerances: another first text may change the order of sums; another position in the row may change the kernels.
    exact = vocabulary.dtype.itemsize >= 4 and not torch.is_autocast_enabled(ids.device.type)
    leaked, moved = _difference(one, other), _difference(one, alone)
    if leaked > (1e-5 if exact else 0.02) or moved > (1e-3 if exact else 0.2):
        raise ConfigError(
            f"packing (True) does not keep texts apart in {name} with {attention} attention (a text's hidden state "
            f"changes by {max(leaked, moved):.1%} behind another one): leave packing out, group_by_length saves "
            "padding too"
        )


def _read(passes: Any, ids: Tensor, positions: Tensor) -> Tensor:
    with passes.as_scaling_pass():
        return passes.backbone.last_hidden_state({"input_ids": ids, "position_ids": positions}).double()


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())

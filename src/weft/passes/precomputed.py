"""A call of the model with a precomputed result of its scaling pass, in the argument `scaling_pass_hidden`.

The scaling pass of a frozen base model depends only on the tokens, so it can be computed once for all epochs
(`train/scaling_cache.py`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weft.base_model.backbone import Backbone
from weft.config import XLoraConfig
from weft.errors import ConfigError

SCALING_PASS_HIDDEN = "scaling_pass_hidden"


def precomputed_problems(config: XLoraConfig, backbone: Backbone) -> list[str]:
    """Why a scaling pass cannot be precomputed, one sentence each; empty if it can."""
    problems = []
    if config.gate_layer is not None:
        problems.append(f"gate_layer ({config.gate_layer}) must be None: with it there is no scaling pass")
    elif config.constant_weight != 0:
        problems.append(
            f"scaling_pass_value ({config.constant_weight}) must be 0: else the experts act in the scaling pass, and "
            "its result is not the base model's alone"
        )
    if backbone.is_encoder_decoder:
        problems.append(
            f"the base model ({type(backbone.base).__name__}) must not be an encoder-decoder, which has two scaling "
            "passes: let them run"
        )
    return problems


def take_precomputed(arguments: dict[str, Any], config: XLoraConfig, backbone: Backbone) -> Tensor | None:
    """Remove `scaling_pass_hidden` (`[batch, seq, hidden]`) from the arguments of a call, and return it; or None.

    Raises:
        ConfigError: this model cannot use it.
        ValueError: its shape does not fit the call's tokens.
    """
    hidden = arguments.pop(SCALING_PASS_HIDDEN, None)
    if hidden is None:
        return None
    problems = precomputed_problems(config, backbone)
    if problems:
        raise ConfigError(f"{SCALING_PASS_HIDDEN} cannot be used:", problems)
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    expected = [*([] if tokens is None else tokens.shape[:2]), config.hidden_size]
    if list(hidden.shape) != expected:
        raise ValueError(
            f"{SCALING_PASS_HIDDEN} has shape {list(hidden.shape)}, expected {expected}: the batch and length of the "
            "call's input_ids or inputs_embeds, and the gate's hidden_size"
        )
    return hidden

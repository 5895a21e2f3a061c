"""What the quantised layers of a base model need to be part of a mixture.

Nothing here imports a library of quantisation: layers are known by what they have.
"""

from __future__ import annotations

from typing import Any

from torch import nn

# Whether a four-bit layer of bitsandbytes may repack its weights, on CPUs with bfloat16 instructions.
_MAY_REPACK = "support_avx512bf16_for_cpu"


def keep_unpacked(base: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from repacking its four-bit weights for the CPU, and undo what it has repacked.

    It would do so at the first forward in evaluation mode, on some CPUs. Repacked layers pass no gradient on, so that
    a gate evaluated once would learn nothing from then on, and reading their `state_dict()` spoils them (0.50).

    Returns:
        The layers that were kept from it, for `let_repack`.
    """
    layers = []
    module: Any
    for module in base.modules():
        if getattr(module, _MAY_REPACK, False):
            setattr(module, _MAY_REPACK, False)
            layers.append(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the layer, all but its scales
            state = module.weight.quant_state
            if state.absmax.dim() == 2:
                state.absmax = state.absmax.T.reshape(-1).float()
    return layers


def let_repack(layers: list[nn.Module]) -> None:
    """Let these layers be as they were."""
    for layer in layers:
        setattr(layer, _MAY_REPACK, True)

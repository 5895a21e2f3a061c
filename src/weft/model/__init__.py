"""XLoraModel: a base model with its experts and a gate, as a tuner of peft.

There are no commands and no training loop here; generation by steps is in `generation`.

    build.py                from_adapters, from_pretrained; loading for the command line
    registration.py         register_with_peft: puts weft's classes into peft's tables
    model.py                XLoraModel; `at_own_weight`, which ignores the global weight
    peft_methods.py         the methods of peft's X-LoRA and of transformers
    peft_state.py           the hooks with which peft casts, saves and loads adapters
    inject.py               adds adapters to a base model as experts, and removes them
    retrained.py            full base weights in adapters, such as embeddings of new tokens
    heads.py                modules that are trained and saved with the gate
    frozen_copies.py        frozen copies of a mixture, for preference training
    inside_transformers.py  a mixture that transformers itself loads into a base model
    saving.py               saves a mixture as a self-contained folder
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.layers.convert import convert_layers_to_xlora as convert_layers_to_xlora
    from weft.model.model import XLoraModel as XLoraModel

__all__ = ["XLoraModel", "convert_layers_to_xlora"]

__getattr__, __dir__ = lazily(
    __name__, {"XLoraModel": "weft.model.model", "convert_layers_to_xlora": "weft.layers.convert"}
)

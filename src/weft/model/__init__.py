"""XLoraModel, put together: a base model with its experts and a gate, as a tuner of peft.

Knows no command, no training loop and no way to generate of its own.

    build.py                from_adapters, from_pretrained, and a mixture as the command line names it
    registration.py         register_with_peft: weft's classes in peft's tables
    model.py                XLoraModel, and its experts as they were trained (`at_own_weight`)
    peft_methods.py         what it answers to because peft's models do
    peft_state.py           what peft asks when it casts, saves and loads
    inject.py               adapters put in as experts, and taken out
    retrained.py            base weights that adapters bring: embeddings of new tokens
    heads.py                modules that are trained and saved with the gate
    frozen_copies.py        frozen copies beside a mixture, for preference training
    inside_transformers.py  a mixture that transformers puts into a base model
    saving.py               the self-contained folder of a mixture
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

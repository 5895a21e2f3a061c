"""Changes the form of a saved mixture: other layouts, one ordinary adapter, other experts, the Hub.

A model is loaded only to fold a mixture or to add an expert.

    mixture.py          reads a saved mixture of any layout, without its base model
    convert.py          `weft convert`: writes a mixture in another layout
    layout.py           shared by the writers of other libraries' layouts
    peft.py             writes the layout of peft's X-LoRA
    xlora.py            writes the layout of the original xlora library
    mistralrs.py        writes the layout of mistral.rs
    folding.py          folds a constant mixture to one LoRA adapter
    experts.py          adds or removes an expert of a saved mixture
    card.py             the model card
    publication.py      selects and checks the files for the Hub
    hub.py              push and pull
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.formats.convert import convert_mixture as convert_mixture

__all__ = ["convert_mixture"]

__getattr__, __dir__ = lazily(__name__, {"convert_mixture": "weft.formats.convert"})

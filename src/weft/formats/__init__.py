"""A saved mixture in another form: another library's layout, one ordinary adapter, other experts, the Hub.

Knows no live model but where it folds one or adds an expert.

    mixture.py          a saved mixture of any layout, read without its base model
    convert.py          `weft convert`: written in another layout
    layout.py           what the other libraries' layouts have in common
    peft.py             that of peft's X-LoRA
    xlora.py            that of the original xlora library
    mistralrs.py        that of mistral.rs
    folding.py          a constant mixture as one LoRA adapter
    experts.py          an expert added to or removed from a saved mixture
    card.py             its model card
    publication.py      what of it goes to the Hub
    hub.py              to the Hub and back
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.lazy import lazily

if TYPE_CHECKING:
    from weft.formats.convert import convert_mixture as convert_mixture

__all__ = ["convert_mixture"]

__getattr__, __dir__ = lazily(__name__, {"convert_mixture": "weft.formats.convert"})

"""The experts' colours, the same in the terminal, on the page and in figures."""

from __future__ import annotations

# The palette of Okabe and Ito, for colour-blind readers too; its black, invisible on dark terminals, is grey here.
PALETTE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")


def colour_of(place: int) -> str:
    """The colour of the expert with this number; colours repeat after eight."""
    return PALETTE[place % len(PALETTE)]

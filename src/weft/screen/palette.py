"""The experts' colours, the same in the terminal, on the page and in figures."""

from __future__ import annotations

# First the palette of Okabe and Ito, for colour-blind readers too; its black, invisible on dark terminals, is grey.
# Then eight more hues, which are not lighter or darker ones of the first: those would look like other shares.
PALETTE = (
    *("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"),
    *("#7b68d8", "#a0643c", "#8fce3c", "#17becf", "#aa3377", "#8a8a2e", "#c9a0e8", "#e8867c"),
)
LOOKS = 2 * len(PALETTE)  # from here on looks repeat


def colour_of(place: int) -> str:
    """The colour of the expert with this number. The second sixteen have the colours of the first, and are marked."""
    return PALETTE[place % len(PALETTE)]


def is_marked(place: int) -> bool:
    """Whether an expert with this number is underlined or hatched, as an earlier one has its colour."""
    return place >= len(PALETTE)

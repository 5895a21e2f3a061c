"""Texts that switch between domains, each labelled with where which begins."""

from __future__ import annotations

import random

from splits import cut

PARTS = (2, 3)  # passages of a text, at least and at most
SHARE = (0.2, 0.35)  # a passage's length, of a domain's text: some 100 to 200 tokens
BETWEEN = "\n\n"

Row = dict[str, object]


class Bag:
    """Draws without putting back, until all are drawn once; then again, in another order."""

    def __init__(self, items: list[str], rng: random.Random) -> None:
        self.items = items
        self.rng = rng
        self.left: list[str] = []

    def draw(self, but_not: tuple[str, ...] = ()) -> str:
        """An item that is none of `but_not`."""
        if all(item in but_not for item in self.left):
            self.left += self.rng.sample(self.items, len(self.items))
        item = next(item for item in self.left if item not in but_not)
        self.left.remove(item)
        return item


def mixed_rows(texts: dict[str, list[str]], widths: dict[str, int], count: int, rng: random.Random) -> list[Row]:
    """Join passages of different domains.

    Args:
        texts: For each domain its texts.
        widths: For each domain the characters of a text, of which a passage has a part.
        count: The number of rows.
        rng: The source of lengths, passages and order.

    Returns:
        The rows, each with "experts": `[[first character, domain], ...]`. Every domain comes equally often, and every
        passage of a domain once before one comes again.
    """
    passages = {}
    for name, sources in texts.items():
        lengths = (int(SHARE[0] * widths[name]), int(SHARE[1] * widths[name]))
        passages[name] = Bag([piece for text in sources for piece in cut(text, lengths, rng)], rng)
    domains = Bag(sorted(texts), rng)
    rows: list[Row] = []
    for _ in range(count):
        names: tuple[str, ...] = ()
        for _ in range(rng.randint(*PARTS)):
            names += (domains.draw(but_not=names),)
        spans: list[tuple[int, str]] = []
        text = ""
        for name in names:
            text += BETWEEN if text else ""
            spans.append((len(text), name))
            text += passages[name].draw()
        rows.append({"text": text, "experts": spans})
    return rows

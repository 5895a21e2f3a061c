"""From a domain's documents to texts in splits: by document, without near copies within or across them."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "demo"))

from extract import without_english

from dedupe import shingles, without_repeats

# In the order in which documents are dealt to them.
WANTED = {"test": 64, "select": 64, "gate": 128, "train": 1500}
LEAST_CHARACTERS = 200  # of a document and of a text
MOST_CHARACTERS = 40_000  # of a document: a long one shall not crowd out the others
# Of a long document, a split but the last takes few texts, and as few as leave enough to the last: many documents count
# more than many texts.
MOST_OF_A_DOCUMENT = 5
LONGEST_LINE = 1000  # of code that a person wrote
LEAST_LETTERS = 0.35  # a share of the characters: else it is a table of numbers
APART = "\u200b"  # no part of a word
IDEOGRAPH = re.compile(r"([\u3041-\u30ff\u4e00-\u9fff])")

Documents = dict[str, str]
Texts = list[tuple[str, str]]  # each with its document's name


def readable(text: str, kind: str) -> str:
    """A document as its domain wants it; empty where it does not."""
    text = text.strip("\n")[:MOST_CHARACTERS]
    if kind == "language":
        text = without_english(text)
    if kind == "code" and max(map(len, text.split("\n"))) > LONGEST_LINE:
        return ""
    if len(text) < LEAST_CHARACTERS or sum(map(str.isalpha, text)) < LEAST_LETTERS * len(text):
        return ""
    return text


def in_words(text: str) -> str:
    """A text in which each character of a script that writes no spaces is a word."""
    return IDEOGRAPH.sub(APART + r"\1", text)


def without_near_copies(documents: Documents) -> Documents:
    """Documents without paragraphs that mostly occur in others, and without those of which too little is left.

    A licence's header is left in one file of all that have it.
    """
    apart = {name: in_words(text) for name, text in documents.items()}
    left = {name: text.replace(APART, "").strip("\n") for name, text in without_repeats(apart).items()}
    return {name: left[name] for name in documents if len(left[name]) >= LEAST_CHARACTERS}


def cut(text: str, lengths: tuple[int, int], rng: random.Random) -> list[str]:
    """Cut a text into pieces, at a line's end if one is near, else at a space.

    Args:
        text: The text.
        lengths: The least and greatest number of characters at which a piece is cut, or a line earlier.
        rng: The source of the lengths.

    Returns:
        The pieces in order, without those that have no half of the least length.
    """
    pieces = []
    begin = 0
    while begin < len(text):
        end = begin + rng.randint(*lengths)
        if end < len(text):
            found = (text.rfind(mark, begin + lengths[0] // 2, end) for mark in "\n ")
            end = next((place for place in found if place >= 0), end)
        pieces.append(text[begin:end].strip("\n"))
        begin = end
    return [piece for piece in pieces if len(piece) >= lengths[0] // 2]


def deal(documents: Documents, width: int, wanted: dict[str, int], rng: random.Random) -> dict[str, Texts]:
    """Deal whole documents to the splits and cut them into texts.

    Where there are few texts, each split but the last has at most a sixth of them. A text of which more than half has
    been seen in a split after its own is left out: lines that many pages share, where none is a copy of another.

    Args:
        documents: The documents of a domain by name.
        width: Characters of a text.
        wanted: The number of texts of each split.
        rng: The source of the order.

    Returns:
        The texts of each split.
    """
    texts = {}
    for name in rng.sample(sorted(documents), len(documents)):
        pieces = cut(documents[name], (width, width), rng)
        texts[name] = [piece for piece in pieces if len(piece) >= LEAST_CHARACTERS] or [documents[name]]
    *_, last = wanted
    for most in range(1, MOST_OF_A_DOCUMENT + 1):
        splits = dealt(texts, wanted, most)
        if len(splits[last]) >= wanted[last]:
            break
    for split, found in without_seen(splits).items():
        rng.shuffle(found)
        splits[split] = found[: wanted[split]]
    return splits


def dealt(texts: dict[str, list[str]], wanted: dict[str, int], most: int) -> dict[str, Texts]:
    """Deal documents, in their order, to the first split that lacks texts: it takes `most` of each, the last all."""
    *first, last = wanted
    sixth = sum(map(len, texts.values())) // 6
    splits: dict[str, Texts] = {split: [] for split in wanted}
    for name, pieces in texts.items():
        split = next((split for split in first if len(splits[split]) < min(1.125 * wanted[split], sixth)), last)
        splits[split] += [(name, piece) for piece in (pieces if split == last else pieces[:most])]
    return splits


def without_seen(splits: dict[str, Texts]) -> dict[str, Texts]:
    """Leave out the texts that have mostly been seen in the splits after theirs."""
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, Texts] = {}
    for split in reversed(splits):
        found = [(text, shingles(in_words(text[1]))) for text in splits[split]]
        kept[split] = [text for text, parts in found if 2 * len(parts & seen) <= len(parts)]
        seen = seen.union(*(parts for _, parts in found))
    return {split: kept[split] for split in splits}

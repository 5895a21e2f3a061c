"""Removal of repeated paragraphs, so that a held-out text is never a near-copy of a training text.

Licence files repeat one another almost word for word, and the language reference shows several
sections under more than one topic; a split by file alone would leak between training and evaluation.
"""

import re

SHINGLE_WORDS = 8


def shingles(paragraph: str) -> set[tuple[str, ...]]:
    """List the overlapping word sequences of a paragraph, blind to case, punctuation and line breaks.

    Args:
        paragraph: Any text.

    Returns:
        Its sequences of `SHINGLE_WORDS` words; empty for a shorter paragraph, such as a heading.
    """
    words = re.findall(r"\w+", paragraph.lower())
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(len(words) - SHINGLE_WORDS + 1)}


def without_repeats(texts: dict[str, str]) -> dict[str, str]:
    """Remove every paragraph of which more than half has already been seen, along with its headings.

    Shorter texts come first: a short licence stays whole, and the long collection that
    quotes it loses the quotation.

    Args:
        texts: The texts by name.

    Returns:
        What remains of each text, by name.
    """
    seen: set[tuple[str, ...]] = set()
    remaining = {}
    for name, text in sorted(texts.items(), key=lambda item: (len(item[1]), item[0])):
        kept: list[str] = []
        headings: list[str] = []
        for paragraph in re.split(r"\n\s*\n", text):
            found = shingles(paragraph)
            headings.append(paragraph)
            if found:
                if 2 * len(found & seen) <= len(found):
                    kept += headings
                headings = []
            seen |= found
        remaining[name] = "\n\n".join(kept)
    return remaining

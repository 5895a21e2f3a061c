"""The texts that are held out of a training's data, and that stay held out when the training resumes.

The record of a run has a digest of the texts that it is evaluated on, and one of each text that was drawn from its
data (at most 64). A run that resumes draws the same ones again, also with more data or another seed: it must not be
evaluated on texts that it has been trained on, and its losses must be comparable with those before.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

_Rows = list[dict[str, Any]]

_SHARE, _MOST, _LEAST = 0.1, 64, 4  # of the sequences
LEAST_ROWS = round(_LEAST / _SHARE)  # with fewer, none are held out


def split(rows: _Rows, seed: int, before: Sequence[str] = ()) -> tuple[_Rows, _Rows | None]:
    """A random tenth of the sequences, at most 64, as the second part; None if it would have fewer than 4.

    Args:
        rows: all sequences. Those of one text have the same `place`: all of them are held out, or none. With fewer than
            40 texts, or if the texts are so long that they would be hardly any, sequences are drawn alone.
        seed: of the choice.
        before: digests of the sequences that the run to resume has held out. They are taken, if at least 4 are there;
            if some are lost, as texts are cut in another way, the rest of their texts as well.
    """
    number = min(_MOST, int(_SHARE * len(rows)))
    chosen = _drawn(rows, number, seed)
    if before and Counter(digest_of(rows[at]) for at in chosen) != Counter(before):
        there = _with_their_texts(rows, _places(rows, before), before)
        chosen = there if len(there) >= _LEAST else chosen
    if len(chosen) < _LEAST:
        return rows, None
    return [row for at, row in enumerate(rows) if at not in chosen], [rows[at] for at in sorted(chosen)]


def _drawn(rows: _Rows, number: int, seed: int) -> set[int]:
    """The indices of at most so many sequences: of whole texts, as a gate that knows a text is better on its rest."""
    texts: dict[Any, list[int]] = {}
    for at, row in enumerate(rows):
        texts.setdefault(row.get("place", at), []).append(at)
    chosen: set[int] = set()
    for sequences in random.Random(seed).sample(list(texts.values()), len(texts)):
        if len(chosen) + len(sequences) <= number:
            chosen.update(sequences)
    if len(texts) >= LEAST_ROWS and len(chosen) > number // 2:
        return chosen
    return set(random.Random(seed).sample(range(len(rows)), number))


def some_of(rows: _Rows, number: int) -> _Rows:
    """At most so many of the rows, at even distances. The first ones would be of the first file.

    Example:
        >>> some_of(code + law + prose, 6)  # two of each, if they are equally many
    """
    number = min(number, len(rows))
    return [rows[at * len(rows) // number] for at in range(number)]


def _places(rows: _Rows, digests: Sequence[str]) -> set[int]:
    """The places of the sequences with these digests; of equal sequences as many as there are digests."""
    left, found = Counter(digests), set()
    for at, row in enumerate(rows):
        digest = digest_of(row)
        if left[digest] > 0:
            left[digest] -= 1
            found.add(at)
    return found


def _with_their_texts(rows: _Rows, there: set[int], before: Sequence[str]) -> set[int]:
    """These sequences, and if some are missing all others of their texts; unless whole texts are far more."""
    if len(there) == len(before):
        return there
    texts = {rows[at].get("place", at) for at in there}
    whole = {at for at, row in enumerate(rows) if row.get("place", at) in texts}
    return whole if len(whole) <= 2 * len(before) else there


def digest_of(row: dict[str, Any]) -> str:
    """The digest of a sequence: of its tokens and labels."""
    return _digest([row["input_ids"], row.get("labels")])


def digest_of_all(rows: _Rows) -> str:
    """The digest of sequences, in their order."""
    return _digest([digest_of(row) for row in rows])


def _digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()

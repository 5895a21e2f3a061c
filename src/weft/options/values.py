"""Checks of values that are the same for all options: invalid numbers, invalid text, several items in one word.

The ranges of single options are checked elsewhere.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any

from weft.files.reading import has_surrogate, is_number, is_whole, shown

# The largest seed of numpy, which transformers seeds too.
_MAX_SEED = 2**32 - 1
# Options that are texts. All other strings can be file names, which can have any bytes.
_TEXTS = ("prompt", "system", "text", "generate", "title")
# Lists of names without commas.
_NAMES = ("rows", "expert_targets")
_ITEM = re.compile(r"[\w-]+=")  # the beginning of an item name=VALUE


def value_problems(options: Any) -> list[str]:
    """One sentence for each invalid value in a dataclass of options.

    Example:
        >>> value_problems(TrainOptions(learning_rate=math.nan))
        ['learning_rate (nan) must be a finite number']
    """
    problems = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name == "seed":
            if not is_whole(value) or not 0 <= value <= _MAX_SEED:
                problems.append(f"seed ({shown(value)}) must be a whole number from 0 to {_MAX_SEED}")
        elif isinstance(value, float) and not is_number(value):
            problems.append(f"{field.name} ({value}) must be a finite number")
        elif isinstance(value, int) and not isinstance(value, bool) and not is_whole(value):
            problems.append(f"{field.name} ({shown(value)}) must be a whole number below 2^63")
        elif isinstance(value, str) and field.name in _TEXTS and has_surrogate(value):
            problems.append(f"{field.name} ({shown(value)}) holds half of a character: expected whole text")
        elif any("\0" in text for text in _strings(value) if field.name not in _TEXTS):
            problems.append(f"{field.name} ({shown(value)}) holds a null character, which no file's name can have")
        elif isinstance(value, list) and any(_items(one, field.name) for one in value):
            items = [item for one in value for item in _items(one, field.name) or [one]]
            problems.append(
                f"{field.name} ({' '.join(map(str, value))}) has commas between its items, expected spaces: "
                f"--{field.name.replace('_', '-')} {' '.join(map(str, items))}"
            )
    return problems


def words_with_commas(options: Any) -> list[str]:
    """The words in which several items are given, for which there is a problem."""
    values = [(field.name, getattr(options, field.name)) for field in dataclasses.fields(options)]
    return [word for name, words in values if isinstance(words, list) for word in words if _items(word, name)]


def _items(word: Any, name: str) -> list[str]:
    """The items of a word that are separated by commas; none if there is no comma, or it may belong to a file name."""
    if not isinstance(word, str) or "," not in word or os.path.exists(_ITEM.sub("", word, count=1)):
        return []
    items = [item for item in word.split(",") if item]
    # A comma at the end separated this word from the next one.
    several = word.endswith(",") or name in _NAMES or any(_ITEM.match(one) or os.path.exists(one) for one in items[1:])
    return items if several else []


def _strings(value: Any) -> list[str]:
    """The strings in an option's value."""
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair if isinstance(part, str)]
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]

"""Stop strings: text is sent up to a stop string, and text that may begin one is held back."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on as far as it cannot contain the beginning of a stop string.

    Args:
        strings: the stop strings, none of them empty.

    Attributes:
        found: whether a stop string was found; after it no more text is passed on.

    Example:
        >>> stops = StopStrings(["END"])
        >>> [stops.add(piece) for piece in ("one E", "NT", " two EN", "D three")]
        ['one ', 'ENT', ' two ', '']
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings = tuple(strings)
        self._held = ""

    def add(self, text: str) -> str:
        """Add text; returns the text that can be sent now."""
        if self.found:
            return ""
        held = self._held + text
        ends = [place for place in map(held.find, self._strings) if place >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)]
        keep = max((_overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """The text that was held back; for the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The length of the longest suffix of the text that is a proper prefix of the string."""
    most = min(len(text), len(string) - 1)
    return next((length for length in range(most, 0, -1) if text.endswith(string[:length])), 0)

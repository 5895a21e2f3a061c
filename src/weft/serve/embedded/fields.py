"""The fields of a JSON body: checked by type and range; a field that was not read is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.files.reading import is_number, is_whole, shown
from weft.serve.requests import RequestError


class Fields:
    """A JSON object whose fields are read.

    Args:
        values: the content; null is the same as a missing field.
        where: the path of the object, for messages.

    Example:
        >>> fields = Fields({"n": 2})
        >>> fields.whole("n", 1, least=1)
        2
        >>> fields.refuse_the_rest()
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._unread = set(self._values)
        self._where = where

    def take(self, name: str) -> Any:
        """The value, without a check; None if it is missing."""
        self._unread.discard(name)
        return self._values.get(name)

    def flag(self, name: str) -> bool:
        """A boolean; False if it is missing."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return bool(value)

    def whole(self, name: str, default: int | None, least: int, most: int | None = None) -> int | None:
        """A whole number in a range; `default` if it is missing."""
        value = self.take(name)
        if value is None:
            return default
        if not is_whole(value) or value < least or (most is not None and value > most):
            limits = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise self._wrong(name, f"a whole number {limits}")
        return int(value)

    def number(self, name: str, default: float, above: float | None = None, most: float | None = None) -> float:
        """A finite number of at least 0, or above `above`, and at most `most`; `default` if it is missing."""
        value = self.take(name)
        if value is None:
            return default
        low = is_number(value) and (value >= 0 if above is None else value > above)
        if not low or (most is not None and value > most):
            limits = "of at least 0" if above is None else f"above {above:g}"
            raise self._wrong(name, f"a finite number {limits}{'' if most is None else f' and at most {most:g}'}")
        return float(value)

    def strings(self, name: str, most: int) -> tuple[str, ...]:
        """A string or a list of at most `most` strings, none of them empty; () if it is missing."""
        value = self.take(name)
        if value is None:
            return ()
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found) or len(found) > most:
            raise self._wrong(name, f"a string or a list of at most {most} strings, none of them empty")
        return tuple(found)

    def ignore(self, *names: str) -> None:
        """Accept fields that do not change the answer."""
        self._unread.difference_update(names)

    def refuse(self, name: str, *neutral: Any) -> None:
        """Refuse a field, except for the values in `neutral`, which change nothing.

        Raises:
            RequestError: it has another value.
        """
        value = self.take(name)
        if value is not None and not any(_same(value, one) for one in neutral):
            raise RequestError(
                f"{self._where}{name} ({shown(value)}) is not supported by the embedded engine: leave it out",
                f"{self._where}{name}",
            )

    def refuse_the_rest(self) -> None:
        """Refuse fields that were not read.

        Raises:
            RequestError: there is such a field.
        """
        if self._unread:
            name = min(self._unread)
            raise RequestError(
                f"{self._where}{shown(name)[1:-1]} is no field that the embedded engine knows: leave it out",
                f"{self._where}{name}",
            )

    def _wrong(self, name: str, expected: str) -> RequestError:
        full = f"{self._where}{name}"
        return RequestError(f"{full} ({shown(self._values[name])}) must be {expected}", full)


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)

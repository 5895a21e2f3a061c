"""Reading files from outside: any problem becomes one error that names the file, the place in it and what is wrong.

Only regular files are opened, and only up to a maximum size. `os.path.isfile` and `isdir` are used throughout, because
the methods of `Path` raise for names that are too long.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from weft.errors import CheckpointError, WeftError, first_line

Error = Callable[[str], WeftError]
# Configs, manifests and tables have kilobytes; those of very large mixtures have a few megabytes.
MOST_BYTES = 2**26
# Maximum nesting of JSON values: they are copied and compared recursively.
_MOST_LEVELS = 64
_MOST_SHOWN = 80
_LARGEST = 3.4e38  # float32
_SURROGATE = re.compile("[\ud800-\udfff]")
_REQUIRED: Any = object()


class JsonTable(dict[str, Any]):
    """A JSON object that knows its file and position, so that errors can name the file and the key.

    Args:
        values: the content of the object.
        place: the file, and the keys that lead to this object.
        error: the class of error to raise.

    Example:
        >>> manifest = read_json(folder / "weft_manifest.json")
        >>> manifest.table("tensors").strings("layer_names")
    """

    def __init__(self, values: dict[str, Any], place: str, error: Error = CheckpointError) -> None:
        super().__init__(values)
        self.place, self._error = place, error

    def string(self, key: str, default: Any = _REQUIRED) -> Any:
        """The string at that key; `default` if the key is missing."""
        return self._checked(key, default, lambda value: isinstance(value, str), "a string")

    def strings(self, key: str, default: Any = _REQUIRED) -> Any:
        """The list of strings at that key."""
        return self._checked(key, default, is_list_of_strings, "a list of strings")

    def whole(self, key: str, default: Any = _REQUIRED, least: int = 0) -> Any:
        """The whole number at that key, at least `least`."""
        return self._checked(
            key, default, lambda value: is_whole(value) and value >= least, f"a whole number of at least {least}"
        )

    def table(self, key: str, default: Any = _REQUIRED) -> Any:
        """The JSON object at that key."""
        value = self._checked(key, default, lambda value: isinstance(value, dict), "a JSON object")
        return JsonTable(value, f"{self.place}: {key}", self._error) if isinstance(value, dict) else value

    def tables(self, key: str) -> list[JsonTable]:
        """The list of one or more JSON objects at that key."""
        values = self._checked(key, _REQUIRED, _is_list_of_tables, "a list of JSON objects, one or more")
        return [JsonTable(value, f"{self.place}: {key} {number}", self._error) for number, value in enumerate(values)]

    def wrong(self, key: str, expected: str) -> WeftError:
        """The error for an unexpected value at that key."""
        return self._error(f"{self.place}: {key} ({shown(self.get(key))}) must be {expected}")

    def _checked(self, key: str, default: Any, fits: Callable[[Any], bool], expected: str) -> Any:
        if key not in self:
            if default is _REQUIRED:
                raise self._error(f"{self.place} lacks {key}: expected {expected}")
            return default
        if self[key] is None and default is None:
            return None
        if not fits(self[key]):
            raise self.wrong(key, expected)
        return self[key]


def read_json(file: str | os.PathLike[str], *, error: Error = CheckpointError, most: int = MOST_BYTES) -> JsonTable:
    """Read a JSON object from a file.

    Args:
        file: the path.
        error: the class of error to raise.
        most: the maximum size in bytes.

    Raises:
        CheckpointError: the file is missing, cannot be read, is too large, or is not a JSON object.
    """
    text = read_text(file, error=error, most=most)
    try:
        values = parse_json(text)
    except ValueError as err:
        raise error(f"{path_shown(file)} is no valid JSON ({err})") from err
    if not isinstance(values, dict):
        raise error(f"{path_shown(file)} must hold a JSON object, not a {type(values).__name__}")
    for place, string in _strings(values):
        if has_surrogate(string):
            raise error(f"{path_shown(file)}: {place} ({shown(string)}) holds half of a character: expected whole text")
    return JsonTable(values, path_shown(file), error)


def read_text(
    file: str | os.PathLike[str],
    *,
    error: Error = CheckpointError,
    most: int | None = MOST_BYTES,
    encoding: str = "utf-8",
) -> str:
    """Read the text of a file.

    Args:
        file: the path.
        error: the class of error to raise.
        most: the maximum size in bytes; None for no limit.
        encoding: "utf-8", or "utf-8-sig", which removes a byte order mark.

    Raises:
        CheckpointError: the file is missing, cannot be read, is too large, or is not UTF-8.
    """
    data = read_bytes(file, error=error, most=most)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as err:
        raise error(f"{path_shown(file)} is no UTF-8 text ({err.reason} at byte {err.start})") from err


def read_bytes(file: str | os.PathLike[str], *, error: Error = CheckpointError, most: int | None = MOST_BYTES) -> bytes:
    """Read the bytes of a regular file; see `read_text`."""
    require_file(file, error=error)
    try:
        size = os.path.getsize(file)
        if most is not None and size > most:
            raise error(f"{path_shown(file)} has {size:,} bytes, expected at most {most:,}")
        with open(file, "rb") as opened:
            return opened.read()
    except (OSError, MemoryError) as err:
        raise error(f"{path_shown(file)} cannot be read: {reason(err)}") from err


def require_file(file: str | os.PathLike[str], *, error: Error = CheckpointError) -> None:
    """Raise if the path is not a regular file.

    Raises:
        CheckpointError: it is missing, cannot be read, or is not a regular file.
    """
    try:
        mode = os.stat(file).st_mode
    except (FileNotFoundError, NotADirectoryError) as err:
        raise error(f"{path_shown(file)} is missing") from err
    except (OSError, ValueError) as err:
        raise error(f"{path_shown(file)} cannot be read: {reason(err)}") from err
    if not stat.S_ISREG(mode):
        raise error(
            f"{path_shown(file)} is {'a folder' if stat.S_ISDIR(mode) else 'no ordinary file'}, expected a file"
        )


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not valid JSON, or is nested too deeply.
    """
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {_MOST_LEVELS} levels of lists and objects in each other") from None
    if text.count("[") + text.count("{") > _MOST_LEVELS and _levels(values) > _MOST_LEVELS:
        raise ValueError(f"more than {_MOST_LEVELS} levels of lists and objects in each other")
    return values


def shown(value: Any) -> str:
    """A value for a message, shortened to one line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: integers with thousands of digits
        return f"a {type(value).__name__}"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 20]}... ({len(text):,} characters)"


def kind_shown(kind: Any) -> str:
    """The name of a type as it was read from a file, for a message; without quotes if it is a printable string."""
    return kind if isinstance(kind, str) and len(kind) < _MOST_SHOWN and kind.isprintable() else shown(kind)


def path_shown(path: str | os.PathLike[str]) -> str:
    """A path for a message, shortened if it is longer than any valid path."""
    text = os.fspath(path)
    return text if len(text) <= 4096 else f"{text[:60]}...{text[-60:]} ({len(text):,} characters)"


def reason(err: BaseException) -> str:
    """The message of an OSError without the file name, or the first line of another error."""
    return getattr(err, "strerror", None) or first_line(err)


def has_surrogate(text: str) -> bool:
    """Whether a text contains a lone surrogate (half of a character), which JSON escapes can produce."""
    return not text.isascii() and _SURROGATE.search(text) is not None


def is_whole(value: Any) -> bool:
    """Whether the value is a whole number that fits into 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether the value is a finite number."""
    if isinstance(value, float):
        return value - value == 0
    return is_whole(value)


def is_finite_in_float32(value: Any) -> bool:
    """Whether the value is a number that is finite in float32, the dtype of scalings."""
    return is_number(value) and abs(value) <= _LARGEST


def own_files(folder: Path) -> Iterator[Path]:
    """The regular files directly in a folder.

    Links that lead out of the folder are skipped, except the links of the Hub's cache to its blobs.
    """
    roots = [folder.resolve()]
    for parent in (folder.resolve(), *folder.resolve().parents):
        if parent.parent.name == "snapshots" and os.path.isdir(parent.parent.parent / "blobs"):
            roots.append(parent.parent.parent / "blobs")
    for name in sorted(os.listdir(folder)):
        file = folder / name
        if os.path.isfile(file) and any(file.resolve().is_relative_to(root) for root in roots):
            yield file


def naming_problem(path: str | os.PathLike[str]) -> str | None:
    """Why this path is not valid for any file or folder; None if it is valid."""
    try:
        at = Path(os.path.abspath(path))
        too_long = len(os.fsencode(at)) > 4095 or any(len(os.fsencode(part)) > 255 for part in at.parts)
    except ValueError as err:
        return first_line(err)
    if too_long:
        return os.strerror(errno.ENAMETOOLONG)
    return "it holds a null character" if "\0" in os.fspath(path) else None


def is_list_of_strings(value: Any) -> bool:
    """Whether the value is a list of strings."""
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_list_of_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _levels(values: Any) -> int:
    """The depth to which lists and dicts are nested in a value."""
    levels, inside = 0, [values]
    while inside := [one for one in inside if isinstance(one, list | dict)]:
        levels += 1
        if levels > _MOST_LEVELS:
            break
        inside = [part for one in inside for part in (one.values() if isinstance(one, dict) else one)]
    return levels


def _strings(values: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(position, string) for each key and string in a nested value."""
    if isinstance(values, str):
        yield place, values
    elif isinstance(values, dict):
        for key, value in values.items():
            yield f"a key of {place}" if place else "a key", key
            yield from _strings(value, f"{place}.{key}" if place else str(key))
    elif isinstance(values, list):
        for value in values:
            yield from _strings(value, place)

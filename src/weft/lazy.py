"""Public names of a package whose modules are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from weft.screen.libraries import import_warnings_hidden


def lazily(package: str, homes: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make a package's `__getattr__` and `__dir__` (PEP 562).

    Args:
        package: the package's `__name__`.
        homes: public name -> the module that defines it.

    Example:
        >>> __getattr__, __dir__ = lazily(__name__, {"train": "weft.train.gate"})
    """

    def find(name: str) -> Any:
        if name in homes:
            return getattr(_imported(homes[name]), name)
        module = f"{package}.{name}"
        try:
            return _imported(module)
        except ModuleNotFoundError as err:
            if err.name != module:
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *homes})

    return find, names


def _imported(module: str) -> Any:
    with import_warnings_hidden():
        return importlib.import_module(module)

"""An extension of griffe, which reads the docstrings: it takes `Examples:` for code, and weft has `Example:`."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ReadExample(griffe.Extension):
    """Give the section with an example the name by which griffe takes it for code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)

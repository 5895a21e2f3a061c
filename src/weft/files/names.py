"""Which names experts can have."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from weft.files.reading import shown

NO_EXPERT = "__base__"  # peft's, in adapter_names
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_LONGEST_NAME = 200  # of a file's 255, as other layouts put something behind it


def name_problems(names: Iterable[Any]) -> list[str]:
    """A sentence for each name that no expert can have; names become folders, and attributes of a ModuleDict.

    Whoever reads names from a file asks this before anything is done with them.
    """
    problems, reserved = [], dir(nn.ModuleDict())
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.append(f"adapters has the name {shown(name)}: names are letters, digits, '_' and '-'")
        elif len(name) > _LONGEST_NAME:
            problems.append(f"adapters has the name {shown(name)}, expected at most {_LONGEST_NAME} characters")
        elif name == NO_EXPERT:
            problems.append(f"adapters has the name {name!r}, which stands for no expert in adapter_names")
        elif name in reserved:
            problems.append(f"adapters has the name {name!r}, which torch.nn.ModuleDict reserves: choose another one")
    return problems

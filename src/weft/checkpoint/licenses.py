"""Model cards (README.md of a folder): the licence that they declare, and whether a person wrote them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

CARD = "README.md"
WEFTS_MARK = "<!-- written by `weft card`: remove this line to keep the card as you change it -->"


def declared_license(card: Path) -> str | None:
    """The licence that a model card declares; None if there is no card, or no licence in it."""
    if not os.path.isfile(card):
        return None
    from huggingface_hub import metadata_load

    try:
        values: Any = metadata_load(card) or {}
    except Exception:  # the YAML of a card from outside may be malformed in any way
        return None
    license = values.get("license")
    if license == "other" and values.get("license_name"):
        license = values["license_name"]
    if isinstance(license, list):
        license = ", ".join(str(part) for part in license)
    return str(license) if license else None


def licensed_card(folder: Path) -> str | None:
    """The text of a folder's model card if it declares a licence, and so must be kept with the files; else None."""
    card = folder / CARD
    return card.read_text(encoding="utf-8") if declared_license(card) is not None else None


def is_own(folder: Path) -> bool:
    """Whether the folder has a card that a person wrote: not weft's, and not peft's empty template."""
    if not os.path.isfile(folder / CARD):
        return False
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    return WEFTS_MARK not in text and text.count("[More Information Needed]") < 10


def keep_own_card(folder: Path, part: Path) -> None:
    """Copy a card that a person wrote from `folder` to `part`, whose files will replace those of the folder."""
    if is_own(folder):
        shutil.copyfile(folder / CARD, part / CARD)

"""Licences as model cards declare them, in the front matter of a README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = "README.md"


def declared_licence(card: Path) -> str | None:
    """The licence that a model card declares; None where there is no card, or it declares none."""
    if not card.is_file():
        return None
    from huggingface_hub import metadata_load

    try:
        values: Any = metadata_load(card) or {}
    except Exception:  # somebody else's card, in YAML of any sort: it declares nothing that can be read
        return None
    licence = values.get("license")
    if licence == "other" and values.get("license_name"):
        licence = values["license_name"]
    if isinstance(licence, list):
        licence = ", ".join(str(part) for part in licence)
    return str(licence) if licence else None


def licensed_card(folder: Path) -> str | None:
    """The text of a folder's model card where it declares a licence: such a card must stay with what it is of."""
    card = folder / CARD
    return card.read_text(encoding="utf-8") if declared_licence(card) is not None else None

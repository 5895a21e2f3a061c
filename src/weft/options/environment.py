"""The options of `weft env`."""

from __future__ import annotations

from dataclasses import dataclass

from weft.options.base import CommandOptions


@dataclass
class EnvOptions(CommandOptions):
    """Show what a problem report needs: versions, processor, devices, extras."""

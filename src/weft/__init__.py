"""weft: several LoRA adapters of one language model, mixed token by token and layer by layer (X-LoRA).

The public names are loaded on first use, so that `import weft` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.callbacks import GateCallback
    from weft.config import XLoraConfig
    from weft.folding import fold, mean_scalings
    from weft.gate import XLoraClassifier
    from weft.integration import from_adapters, from_pretrained, register_with_peft, unregister_from_peft
    from weft.model import XLoraModel
    from weft.streaming import Generation, Step, generate, stream

__version__ = "0.1.0"

_HOMES = {
    "GateCallback": "weft.callbacks",
    "Generation": "weft.streaming",
    "Step": "weft.streaming",
    "XLoraConfig": "weft.config",
    "XLoraClassifier": "weft.gate",
    "XLoraModel": "weft.model",
    "fold": "weft.folding",
    "from_adapters": "weft.integration",
    "from_pretrained": "weft.integration",
    "generate": "weft.streaming",
    "mean_scalings": "weft.folding",
    "register_with_peft": "weft.integration",
    "stream": "weft.streaming",
    "unregister_from_peft": "weft.integration",
}

__all__ = [
    "GateCallback",
    "Generation",
    "Step",
    "XLoraClassifier",
    "XLoraConfig",
    "XLoraModel",
    "fold",
    "from_adapters",
    "from_pretrained",
    "generate",
    "mean_scalings",
    "register_with_peft",
    "stream",
    "unregister_from_peft",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        return getattr(importlib.import_module(home), name)
    try:
        return importlib.import_module(f"weft.{name}")
    except ModuleNotFoundError as err:
        if err.name != f"weft.{name}":
            raise
        raise AttributeError(f"module 'weft' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""Old module paths, which still work: `weft.losses` is now `weft.gate.losses`.

They are kept for documented imports and for pickled objects.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "weft.callbacks": "weft.train.callbacks",
    "weft.card": "weft.formats.card",
    "weft.change_experts": "weft.formats.experts",
    "weft.figures": "weft.traces.figures",
    "weft.folding": "weft.formats.folding",
    "weft.format_options": "weft.options",
    "weft.gate_metrics": "weft.gate.metrics",
    "weft.gate_start": "weft.train.gate_fit",
    "weft.hub": "weft.formats.hub",
    "weft.integration": "weft.model.build",
    "weft.losses": "weft.gate.losses",
    "weft.page": "weft.traces.page",
    "weft.routing": "weft.gate.routing",
    "weft.sampling": "weft.generation.sampling",
    "weft.scaling_cache": "weft.train.scaling_cache",
    "weft.streaming": "weft.generation.stream",
    "weft.tracing": "weft.traces.record",
    "weft.train_experts": "weft.train.experts",
}


class _Moved:
    """Finds and loads a module by its old path: the same module object under both names."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing but restore the spec: the module was executed under its new name."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def find_moved_modules() -> None:
    """Let imports find modules by their old paths."""
    sys.meta_path.append(_Moved())

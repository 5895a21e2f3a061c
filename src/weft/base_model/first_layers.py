"""The first decoder layers of a backbone, as a module that is called like the backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn


class ShortBackbone:
    """A shallow copy of a backbone with fewer decoder layers. Layers and parameters are shared with the backbone.

    The backbone's own `forward` prepares masks, positions and embeddings, so this works for any architecture.

    Args:
        module: the backbone.
        path: the path of its list of decoder layers.
        number: the number of layers to run.
    """

    def __init__(self, module: nn.Module, path: str, number: int) -> None:
        layers = list(cast(nn.ModuleList, module.get_submodule(path)))[:number]
        self.number = number
        self._last = _Watched(layers[-1])
        self._copies: list[tuple[nn.Module, nn.Module]] = []
        self._module = self._with_layers(module, path.split("."), nn.ModuleList([*layers[:-1], self._last]))

    def run(self, call: Callable[[nn.Module], Any]) -> Tensor:
        """Let `call` run the shortened module, and return the output of its last layer, `[batch, seq, hidden]`."""
        for copied, module in self._copies:
            copied.training = module.training
        try:
            call(self._module)
            assert self._last.output is not None
            return self._last.output
        finally:
            self._last.output = None

    def _with_layers(self, module: nn.Module, path: list[str], layers: nn.ModuleList) -> nn.Module:
        """A shallow copy of the module, and of the modules on the path, with another list of layers."""
        copied: Any = copy.copy(module)
        # Wrappers around the backbone's forward (accelerate's hooks, torch.compile) would run all layers.
        copied.__dict__.pop("forward", None)
        copied.__dict__.pop("_compiled_call_impl", None)
        name, *rest = path
        child = module.get_submodule(name)
        copied._modules = {**module._modules, name: self._with_layers(child, rest, layers) if rest else layers}
        self._copies.append((copied, module))
        return copied


class _Watched(nn.Module):
    """A decoder layer that keeps its output. Other attributes are those of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.output: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        result = self.layer(*args, **kwargs)
        self.output = result[0] if isinstance(result, tuple) else result
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

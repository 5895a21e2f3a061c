"""The models to compare, loaded one after the other onto one base model: a mixture, adapters, peft's Arrow.

All of them share the base model's weights. The base model is restored after each one, so that a mixture that is loaded
again from its folder is the same, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import ArrowConfig
from peft.tuners.lora.arrow import create_arrow_model

from weft.base_model.state import Flags
from weft.checkpoint.adapters import local_folder, read_adapters
from weft.evaluate.merges import refuse_different_ranks, refuse_unmergeable
from weft.files.writing import temporary_folder
from weft.formats.experts import drop_expert
from weft.model.build import from_pretrained
from weft.model.inject import inject_adapters, remove_adapters
from weft.model.retrained import Retrained

# (the loaded model, a function that restores the base model)
Loaded = tuple[Any, Callable[[], Any]]


@dataclass(frozen=True)
class Contestant:
    """A model to compare.

    Args:
        key: identifies it; if the next contestant has the same key, it is not loaded again.
        load: loads it onto a base model.
    """

    key: str
    load: Callable[[Any], Loaded]


class SharedBase:
    """A base model and the contestant that is loaded onto it.

    Args:
        base: a causal language model without adapters.

    Example:
        >>> shared = SharedBase(base)
        >>> shared.load(mixture("my-mixture"))(input_ids)
        >>> shared.clear()  # restores the base model
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._flags = Flags(base)
        self._key: str | None = None
        self._model: Any = None
        self._leave: Callable[[], Any] = lambda: None

    def load(self, contestant: Contestant) -> Any:
        """Load a contestant onto the base model, in place of the present one; returns the model to run."""
        if self._key != contestant.key:
            self.clear()
            try:
                self._model, self._leave = contestant.load(self.base)
            except BaseException:
                remove_adapters(self.base)
                self.clear()
                raise
            self._key = contestant.key
            self.base.eval()
        return self._model

    def clear(self) -> None:
        """Restore the base model."""
        self._leave()
        self._key, self._model, self._leave = None, None, lambda: None
        self._flags.restore(self.base)


def base_alone() -> Contestant:
    """The base model itself."""
    return Contestant("base", lambda base: (base, lambda: None))


def mixture(folder: str) -> Contestant:
    """A mixture from its folder."""

    def load(base: Any) -> Loaded:
        model: Any = from_pretrained(folder, base)
        return model, model.base_model.unload

    return Contestant(f"mixture {folder}", load)


def dropped(folder: str, name: str) -> Contestant:
    """A mixture without one expert, as `weft drop-expert` writes it."""

    def load(base: Any) -> Loaded:
        with temporary_folder(lambda part: drop_expert(folder, name, part / "mixture")) as part:
            model: Any = from_pretrained(part / "mixture", base)
        return model, model.base_model.unload

    return Contestant(f"mixture {folder} without {name}", load)


def adapters(paths: dict[str, str]) -> Contestant:
    """Ordinary adapters as peft's `LoraModel`; the first one is active."""

    def load(base: Any) -> Loaded:
        read = read_adapters(paths, allow_dora=True, base_is_known=True)
        retrained = Retrained(base, read)

        def leave() -> None:
            remove_adapters(base)
            retrained.use(False)

        try:
            retrained.use(True)
            lora_model = inject_adapters(base, read)
        except BaseException:
            leave()
            raise
        lora_model.set_adapter(next(iter(paths)))
        return lora_model, leave

    return Contestant(f"adapters {paths}", load)


def arrow(paths: dict[str, str], seed: int) -> Contestant:
    """peft's Arrow (arXiv 2405.11157): routes each token to the experts with the most similar prototypes, untrained.

    Loading it raises an error if the experts differ in rank or targets.
    """

    def load(base: Any) -> Loaded:
        read = read_adapters(paths, allow_dora=True, base_is_known=True)
        configs = {adapter.name: adapter.config for adapter in read}
        refuse_unmergeable(configs)
        refuse_different_ranks(configs)
        folders = [str(local_folder(path, f"adapter {name!r}")) for name, path in paths.items()]
        config = ArrowConfig(top_k=min(ArrowConfig().top_k, len(paths)), rng_seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = create_arrow_model(base, folders, config)
        return model, partial(remove_adapters, base)

    return Contestant(f"arrow {paths} {seed}", load)

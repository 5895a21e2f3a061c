"""One base model that carries one thing after the other: a mixture, single adapters, peft's merges, peft's Arrow.

Whatever is compared shares the base's weights, and takes its place in them by turns. After each turn the base is as it
was, so that a mixture that comes back from its folder is the same, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import ArrowConfig
from peft.tuners.lora import LoraModel
from peft.tuners.lora.arrow import create_arrow_model

from weft.checkpoint.adapters import local_folder, read_adapters
from weft.errors import AdapterError
from weft.model.build import from_pretrained
from weft.model.inject import inject_adapters, remove_adapters
from weft.model.retrained import Retrained

# What comes onto the base, and how it goes again.
Carried = tuple[Any, Callable[[], Any]]
MERGES = ("linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune")
_MEANS = ("ties", "dare_ties")  # divide by the number of experts themselves
_WHOLE = ("linear", "cat")  # prune nothing
_MERGED = "weft_merged"


@dataclass(frozen=True)
class Load:
    """Something that a base model can carry.

    Args:
        key: what it is; equal keys need not be loaded twice in a row.
        put: brings it onto the base.
    """

    key: str
    put: Callable[[Any], Carried]


class Stage:
    """A base model and what it carries just now.

    Args:
        base: a causal language model without adapters.

    Example:
        >>> stage = Stage(base)
        >>> stage.carry(mixture("my-mixture"))(input_ids)
        >>> stage.clear()  # the base as it was
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        self._requires_grad = {name: p.requires_grad for name, p in base.named_parameters()}
        self._training = base.training
        self._key: str | None = None
        self._model: Any = None
        self._leave: Callable[[], Any] = lambda: None

    def carry(self, load: Load) -> Any:
        """Bring it onto the base, in the place of what is there."""
        if self._key != load.key:
            self.clear()
            try:
                self._model, self._leave = load.put(self.base)
            except BaseException:
                remove_adapters(self.base)
                self.clear()
                raise
            self._key = load.key
            self.base.eval()
        return self._model

    def clear(self) -> None:
        """Take what is there off the base."""
        self._leave()
        self._key, self._model, self._leave = None, None, lambda: None
        self.base.train(self._training)
        for name, parameter in self.base.named_parameters():
            parameter.requires_grad_(self._requires_grad[name])


def nothing() -> Load:
    """The base model itself."""
    return Load("base", lambda base: (base, lambda: None))


def mixture(folder: str) -> Load:
    """A mixture from its folder."""

    def put(base: Any) -> Carried:
        model: Any = from_pretrained(folder, base)
        return model, model.base_model.unload

    return Load(f"mixture {folder}", put)


def adapters(paths: dict[str, str]) -> Load:
    """Ordinary adapters side by side, as peft's `LoraModel`; the first one acts."""

    def put(base: Any) -> Carried:
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

    return Load(f"adapters {paths}", put)


def arrow(paths: dict[str, str], seed: int) -> Load:
    """peft's Arrow (arXiv 2405.11157): each token goes to the experts whose prototypes it resembles; nothing learns.

    Raises, when it is put on: what peft raises where the experts differ in rank or targets.
    """

    def put(base: Any) -> Carried:
        _refuse_unlike(
            {adapter.name: adapter.config for adapter in read_adapters(paths, allow_dora=True, base_is_known=True)}
        )
        folders = [str(local_folder(path, f"adapter {name!r}")) for name, path in paths.items()]
        config = ArrowConfig(top_k=min(ArrowConfig().top_k, len(paths)), rng_seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = create_arrow_model(base, folders, config)
        return model, partial(remove_adapters, base)

    return Load(f"arrow {paths} {seed}", put)


@dataclass(frozen=True)
class Merge:
    """How experts are merged: peft's name of it, the weight of each, and the share of values that are kept.

    By default TIES has weight 1, as it takes a mean itself, and the others, which are sums, 1/N.
    """

    kind: str
    weight: float
    density: float = 0.5

    @classmethod
    def default(cls, kind: str, num_experts: int) -> Merge:
        """The equal weights of a mean."""
        return cls(kind, 1.0 if kind in _MEANS else 1 / num_experts)

    def variations(self) -> list[Merge]:
        """This one, and others with equal weights and with other densities."""
        densities = [self.density] if self.kind in _WHOLE else [self.density, 0.2, 0.8]
        return [
            Merge(self.kind, self.weight * factor, density) for factor in (1.0, 0.5, 2.0, 4.0) for density in densities
        ]

    def __str__(self) -> str:
        density = "" if self.kind in _WHOLE else f", density {self.density:g}"
        return f"weight {self.weight:.3g} each{density}"


@contextmanager
def merged(lora_model: LoraModel, merge: Merge, seed: int) -> Iterator[Any]:
    """The base model with one static merge of all adapters, by peft's `add_weighted_adapter`.

    Raises:
        AdapterError: an adapter has what the merge would drop.
        ValueError: peft cannot merge these adapters so.
    """
    names = list(lora_model.peft_config)
    _refuse_unlike(lora_model.peft_config)
    first: Any = lora_model.peft_config[names[0]]
    rslora, kind = first.use_rslora, cast(Any, merge.kind)
    try:
        # peft copies the first adapter's options; with rank-stabilised scaling the merge would count sqrt(rank) times.
        first.use_rslora = False
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)  # dare drops values at random
            lora_model.add_weighted_adapter(
                names, [merge.weight] * len(names), _MERGED, combination_type=kind, density=merge.density
            )
        first.use_rslora = rslora
        lora_model.set_adapter(_MERGED)
        lora_model.model.eval()
        yield lora_model.model
    finally:
        first.use_rslora = rslora
        if _MERGED in lora_model.peft_config:
            lora_model.set_adapter(names[0])
            lora_model.delete_adapter(_MERGED)


def _refuse_unlike(configs: dict[str, Any]) -> None:
    """Raise where an adapter has what merges and Arrow would leave out without a word."""
    for name, config in configs.items():
        for option in ("use_dora", "lora_bias"):
            if getattr(config, option, False):
                raise AdapterError(f"expert {name!r} has {option}, which peft would leave out here")


def folder_of(path: str) -> Path:
    """Where the files of a mixture or an adapter are."""
    return local_folder(path, "model")

"""Static merges of the experts by peft's methods, and the search for the best weights of one.

A search varies equal weights and the density, and takes what has the lowest perplexity on texts that are given for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel

from weft.errors import AdapterError
from weft.evaluate.data_sets import DataSet
from weft.evaluate.scoring import Runner, score
from weft.options import EvalOptions

MERGES = ("linear", "cat", "ties", "dare_ties", "dare_linear", "magnitude_prune")
_MEANS = ("ties", "dare_ties")  # divide by the number of experts themselves
_UNPRUNED = ("linear", "cat")
_MERGED = "weft_merged"


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
        densities = [self.density] if self.kind in _UNPRUNED else [self.density, 0.2, 0.8]
        return [
            Merge(self.kind, self.weight * factor, density) for factor in (1.0, 0.5, 2.0, 4.0) for density in densities
        ]

    def __str__(self) -> str:
        density = "" if self.kind in _UNPRUNED else f", density {self.density:g}"
        return f"weight {self.weight:.3g} each{density}"


@contextmanager
def merged(lora_model: LoraModel, merge: Merge, seed: int) -> Iterator[Any]:
    """The base model with one static merge of all adapters, by peft's `add_weighted_adapter`.

    Raises:
        AdapterError: an adapter has what the merge would drop.
        ValueError: peft cannot merge these adapters so.
    """
    names = list(lora_model.peft_config)
    refuse_unmergeable(lora_model.peft_config)
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


def best_merge(lora_model: Any, merge: Merge, data: DataSet, tokenizer: Any, options: EvalOptions) -> Merge:
    """The variation with the lowest perplexity; the merge itself where all are alike.

    Args:
        lora_model: peft's, with the experts.
        merge: where the search starts.
        data: texts that are neither trained on nor in the table.
        tokenizer: the base model's.
        options: batch size and seed.

    Raises:
        ValueError: peft cannot merge these adapters so.
    """
    found = {}
    for variation in merge.variations():
        with merged(lora_model, variation, options.seed) as model:
            runner = Runner(model, tokenizer, options.batch_size)
            loss = sum(loss for loss, _ in score(runner, data))
            found[variation] = math.inf if math.isnan(loss) else loss
    return min(found, key=lambda variation: found[variation])


def refuse_unmergeable(configs: dict[str, Any]) -> None:
    """Raise where an adapter has what merges and Arrow would leave out without a word."""
    for name, config in configs.items():
        for option in ("use_dora", "lora_bias"):
            if getattr(config, option, False):
                raise AdapterError(f"expert {name!r} has {option}, which peft would leave out here")

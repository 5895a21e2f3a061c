"""Static merges of the experts with peft's methods, and the search for their best weights.

The search varies the common weight and the density, and takes the merge with the lowest perplexity on separate texts.
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
_MEANS = ("ties", "dare_ties")  # these divide by the number of experts themselves
_UNPRUNED = ("linear", "cat")
_OF_ANY_RANK = "cat"
_MERGED = "weft_merged"


@dataclass(frozen=True)
class Merge:
    """The options of a merge: peft's name of the method, the weight of each expert, the fraction of kept values.

    The default weight is 1 for TIES, which computes a mean, and 1/N for the others, which compute a sum.
    """

    kind: str
    weight: float
    density: float = 0.5

    @classmethod
    def default(cls, kind: str, num_experts: int) -> Merge:
        """The merge with the weights of a mean."""
        return cls(kind, 1.0 if kind in _MEANS else 1 / num_experts)

    def variations(self) -> list[Merge]:
        """This merge, and variations of its weight and density."""
        densities = [self.density] if self.kind in _UNPRUNED else [self.density, 0.2, 0.8]
        return [
            Merge(self.kind, self.weight * factor, density) for factor in (1.0, 0.5, 2.0, 4.0) for density in densities
        ]

    def __str__(self) -> str:
        density = "" if self.kind in _UNPRUNED else f", density {self.density:g}"
        return f"weight {self.weight:.3g} each{density}"


@contextmanager
def merged(lora_model: LoraModel, merge: Merge, seed: int) -> Iterator[Any]:
    """In this block, the base model with one static merge of all adapters, by peft's `add_weighted_adapter`.

    Raises:
        AdapterError: an adapter has an option that the merge would ignore.
        ValueError: peft cannot merge these adapters with this method.
    """
    names = list(lora_model.peft_config)
    refuse_unmergeable(lora_model.peft_config)
    if merge.kind != _OF_ANY_RANK:
        refuse_different_ranks(lora_model.peft_config)
    first: Any = lora_model.peft_config[names[0]]
    rslora, kind = first.use_rslora, cast(Any, merge.kind)
    try:
        # peft copies the first adapter's options; rank-stabilised scaling would multiply the merge by sqrt(rank).
        first.use_rslora = False
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)  # DARE drops random values
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
    """The variation with the lowest perplexity; the merge itself if all are equal.

    Args:
        lora_model: peft's `LoraModel` with the experts.
        merge: the start of the search.
        data: texts that are neither training data nor in the table.
        tokenizer: the base model's tokenizer.
        options: for batch size and seed.

    Raises:
        ValueError: peft cannot merge these adapters with this method.
    """
    found = {}
    for variation in merge.variations():
        with merged(lora_model, variation, options.seed) as model:
            runner = Runner(model, tokenizer, options.batch_size)
            loss = sum(loss for loss, _ in score(runner, data))
            found[variation] = math.inf if math.isnan(loss) else loss
    return min(found, key=lambda variation: found[variation])


def refuse_different_ranks(configs: dict[str, Any]) -> None:
    """Raise if the adapters have different ranks, of which peft adds no sum and has no Arrow.

    Raises:
        AdapterError: they have.
    """
    if len({config.r for config in configs.values()}) > 1:
        ranks = ", ".join(f"{name} {config.r}" for name, config in configs.items())
        raise AdapterError(f"the experts have different ranks ({ranks})")


def refuse_unmergeable(configs: dict[str, Any]) -> None:
    """Raise if an adapter has an option that merges and Arrow would silently ignore.

    Raises:
        AdapterError: it has such an option.
    """
    for name, config in configs.items():
        for option in ("use_dora", "lora_bias"):
            if getattr(config, option, False):
                raise AdapterError(f"expert {name!r} has {option}, which peft would leave out here")

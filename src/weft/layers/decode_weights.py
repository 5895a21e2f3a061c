"""Computes the rank weights of all layers at once, for short inputs as in decoding.

Each rank of an expert has the weight λ · s · g. With few tokens, computing this in each layer takes as long as the
layer's matrix products. Here it is one index_select and one product for each call of the model.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache

from weft.gate.routing import TopK
from weft.layers.carrier import ReadyWeights
from weft.layers.experts import Stack, StackedExperts

# With more tokens the layers' own computation is as fast, and needs less memory.
FEW_TOKENS = 32
# While a text is decoded, each call checks the stacks of every eighth layer, and of the first one.
SHARE_LOOKED_AT = 8


@dataclass(frozen=True)
class _RankTable:
    """The indices from which the weights of all ranks are gathered.

    Attributes:
        stacks: layer number -> stack; None for a layer that computes its own weights.
        sizes: number of ranks in each layer's stack; 0 for None.
        index: for each rank of all layers, its index in the scalings' flattened axes [layer, expert].
        scales: s of each rank.
    """

    stacks: tuple[Stack | None, ...]
    sizes: list[int]
    index: Int[Tensor, " rank"]
    scales: Float[Tensor, " rank"]


@dataclass(frozen=True)
class _ExpertTable:
    """The same for whole experts, for layers in which all experts have the same rank.

    Attributes:
        stacks: layer number -> stack; None for a layer with other ranks.
        scales: s of each expert; zeros for None.
        rank: the rank of all experts.
    """

    stacks: tuple[Stack | None, ...]
    scales: Float[Tensor, "layer expert"]
    rank: int


class DecodeWeights:
    """Computes the weights of linear layers that have a single stack. Other layers compute their own weights.

    The layers do not check the stacks that come with the weights, so it is checked here that the stacks are current.
    To check all of them takes as long as several layers, as it reads every parameter. So a call that continues with the
    KV cache of the previous call checks an eighth of the layers. A change of all layers (`.to()`, a cast, another
    active adapter) is found at once, new storage in a single layer within eight tokens. A compiled graph uses the
    stacks of the last call that was not compiled, as the layers do.

    Args:
        experts: the experts of each LoRA layer, in order; None for layers that are not linear.
    """

    def __init__(self, experts: Sequence[StackedExperts | None]) -> None:
        self._experts = experts
        self._seen: list[tuple[Stack, ...]] = []
        self._tables: dict[tuple[int, int | None, torch.device], _RankTable] = {}
        self._expert_tables: dict[tuple[int, torch.device], _ExpertTable] = {}
        self._cache: weakref.ref[Cache] | None = None
        self._calls = 0
        self._to_look_at: Sequence[int] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"experts": self._experts}  # a copy makes its own stacks

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def begin_call(self, cache: Any) -> None:
        """Choose the layers to check in this call of the model.

        Args:
            cache: the call's `past_key_values`, or None.
        """
        if torch.compiler.is_compiling():
            return
        goes_on = self._cache is not None and self._cache() is cache
        if not goes_on:
            self._cache = weakref.ref(cache) if isinstance(cache, Cache) else None
        self._calls += 1
        everywhere = range(len(self._experts))
        self._to_look_at = (0, *everywhere[self._calls % SHARE_LOOKED_AT :: SHARE_LOOKED_AT]) if goes_on else everywhere

    def per_rank(
        self,
        scalings: Float[Tensor, "batch seq layer expert"],
        first_layer: int,
        global_weight: float,
        *,
        some_left_out: bool = False,
    ) -> ReadyWeights | None:
        """The weights of all ranks; None if the layers should compute them.

        Args:
            scalings: λ after top-k; a layer axis of 1 is shared by all layers.
            first_layer: number of the first layer in the layer axis.
            global_weight: g.
            some_left_out: a scaling of 0 leaves its expert out even if A x is infinite (0 · inf would be NaN).
        """
        _, _, num_layers, num_experts = scalings.shape
        key = (num_experts, None if num_layers == 1 else first_layer, scalings.device)
        few = _few(scalings)
        # The table is made even if it is not used now, for later compiled calls.
        if self._refresh(few) and key not in self._tables:
            self._tables[key] = self._table(*key)
        table = self._tables.get(key)
        if table is None or not few:
            return None
        tokens = scalings.shape[:2]
        weights = scalings.flatten(2).flatten(0, 1).index_select(1, table.index) * (table.scales * global_weight)
        left_out = (weights == 0).split(table.sizes, 1) if some_left_out else None
        return ReadyWeights(
            table.stacks,
            tokens if tokens.numel() > 1 else None,
            0,
            weights.split(table.sizes, 1),
            left_out=left_out,
        )

    def of_chosen(self, chosen: TopK, num_experts: int, first_layer: int, global_weight: float) -> ReadyWeights | None:
        """The weights of each token's chosen experts, which the layers gather; None if that is not faster.

        Args:
            chosen: λ of each token's experts, `[batch, seq, layer, top_k]`; a layer axis of 1 is shared by all layers.
            num_experts: number of experts from which they were chosen.
            first_layer: number of the first layer in the layer axis.
            global_weight: g.
        """
        batch, seq, num_layers, top_k = chosen.kept.shape
        tokens = batch * seq
        key = (num_experts, chosen.kept.device)
        few = _few(chosen.kept)
        if self._refresh(few) and key not in self._expert_tables:
            self._expert_tables[key] = self._expert_table(*key)
        table = self._expert_tables.get(key)
        # Gathering copies the experts' weights, so each chosen expert costs about twice as much.
        if table is None or not few or 2 * tokens * top_k > num_experts:
            return None
        first_layer = 0 if num_layers == 1 else first_layer
        scales = table.scales[first_layer:]
        kept, experts = chosen.kept.flatten(0, 1), chosen.experts.flatten(0, 1)
        experts = experts.expand(tokens, len(scales), top_k)
        weights = kept * scales.expand(tokens, -1, -1).gather(2, experts) * global_weight
        ranks = experts[..., None] * table.rank + torch.arange(table.rank, device=kept.device)
        return ReadyWeights(
            table.stacks,
            (batch, seq),
            first_layer,
            weights.repeat_interleave(table.rank, 2).unbind(1),
            chosen=ranks.transpose(0, 1).flatten(1).unbind(0),
        )

    def _refresh(self, few: bool) -> bool:
        """Drop the tables of outdated stacks. False in a compiled graph, which cannot make tables.

        Args:
            few: the layers will not check their own stacks.
        """
        if torch.compiler.is_compiling():
            return False
        if few:
            self._look()
        now = [() if one is None else one.current for one in self._experts]
        if len(now) != len(self._seen) or any(one is not other for one, other in zip(now, self._seen, strict=True)):
            self._seen = now
            self._tables, self._expert_tables = {}, {}
        return True

    def _look(self) -> None:
        """Check the stacks of the layers that were chosen for this call; if one is outdated, check all layers."""
        numbers, self._to_look_at = self._to_look_at, ()
        changed = False
        for number in numbers:
            experts = self._experts[number]
            changed |= experts is not None and experts.look()
        if changed and len(numbers) < len(self._experts):
            self._to_look_at = range(len(self._experts))
            self._look()

    def _usable(self, number: int, num_experts: int, device: torch.device) -> Stack | None:
        stacks = self._seen[number]
        if len(stacks) != 1 or stacks[0].biased or stacks[0].dora or stacks[0].down.device != device:
            return None
        return stacks[0] if stacks[0].num_columns == num_experts else None

    def _table(self, num_experts: int, first_layer: int | None, device: torch.device) -> _RankTable:
        """The table for scalings whose first layer is `first_layer`; None for scalings that all layers share."""
        stacks: list[Stack | None] = []
        sizes, index, scales = [], [torch.zeros(0, dtype=torch.long)], [torch.zeros(0)]
        for number in range(len(self._experts)):
            before = first_layer is not None and number < first_layer
            stack = None if before else self._usable(number, num_experts, device)
            stacks.append(stack)
            sizes.append(0 if stack is None else sum(stack.ranks))
            if stack is not None:
                ranks = torch.tensor(stack.ranks)
                row = 0 if first_layer is None else number - first_layer
                index.append((row * num_experts + torch.tensor(stack.columns)).repeat_interleave(ranks))
                scales.append(stack.scales.cpu().repeat_interleave(ranks))
        return _RankTable(tuple(stacks), sizes, torch.cat(index).to(device), torch.cat(scales).to(device))

    def _expert_table(self, num_experts: int, device: torch.device) -> _ExpertTable:
        usable = [self._usable(number, num_experts, device) for number in range(len(self._experts))]
        alike = [
            None if stack is None or stack.rank_expert is not None or stack.column_index is not None else stack
            for stack in usable
        ]
        rank = next((stack.ranks[0] for stack in alike if stack is not None), 1)
        stacks = tuple(stack if stack is not None and stack.ranks[0] == rank else None for stack in alike)
        none = torch.zeros(num_experts, device=device)
        return _ExpertTable(stacks, torch.stack([none if one is None else one.scales for one in stacks]), rank)


def _few(scalings: Tensor) -> bool:
    """Whether the call has few tokens and no gradients or autocast."""
    batch, seq = scalings.shape[:2]
    if torch.is_grad_enabled() or torch.is_autocast_enabled(scalings.device.type):
        return False
    return batch * seq <= FEW_TOKENS

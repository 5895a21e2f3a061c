"""The experts of one LoRA layer, stacked along their ranks, so that N experts need two matrix products.

With A = [A_1; ...; A_N] ([rank, in]) and B = [B_1, ..., B_N] ([out, rank]), the sum of all experts is B (A x). The
weight of an expert is applied to its block of the rank axis.

The stack owns the storage: peft's parameters become views of it. So the experts are in memory only once, and in-place
changes of a parameter (loading, an optimizer) change the stack. If a parameter gets new storage (`.to()`, a cast, a
deep copy), the experts are stacked again, at the latest in the next forward; while a text is decoded, a change in a
single layer is found within eight tokens (see `decode_weights.py`). In distributed training, wrappers need the
parameters in their own storage (shards of FSDP, flat buffers of ZeRO). Then the stack is a copy, made in each call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from weft.base_model.devices import execution_device, keep_resident
from weft.checkpoint.adapters import refuse_dora
from weft.distributed import parameters_may_be_wrapped, sharding_is_to_come
from weft.errors import AdapterError

_Rows = Callable[[Tensor], Tensor]
# torch's mark on the modules whose parameters FSDP manages.
_FSDP = "_is_fsdp_managed_module"


@dataclass(frozen=True)
class Storage:
    """The attribute in which a kind of LoRA layer has one of its two factors, and the factor's shape.

    Attributes:
        attribute: name of the layer's `ModuleDict` or `ParameterDict` of adapters.
        to_rows: converts the parameter to a view with the rank as the first axis.
        from_rows: converts this view to the parameter's shape.
    """

    attribute: str
    to_rows: _Rows
    from_rows: _Rows

    def find(self, target: LoraLayer, name: str) -> nn.Parameter:
        """The parameter of adapter `name`; KeyError if the layer has none."""
        container = getattr(target, self.attribute)
        return cast(nn.Parameter, container[name].weight if isinstance(container, nn.ModuleDict) else container[name])

    def owners(self, target: LoraLayer) -> list[dict[str, Any]]:
        """The dicts through which the parameters of all adapters are reached."""
        container = getattr(target, self.attribute)
        if not isinstance(container, nn.ModuleDict):
            return [container._parameters]
        return [cast(dict, container._modules), *(cast(dict, module._parameters) for module in container.values())]


def as_it_is(weight: Tensor) -> Tensor:
    """For factors with the rank as the first axis."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """For factors `[out, rank]`, in both directions."""
    return weight.T


@dataclass(frozen=True)
class StorageLayout:
    """The two factors of a kind of LoRA layer: A (down to the rank) and B (up from it)."""

    down: Storage
    up: Storage


@dataclass(frozen=True)
class Stack:
    """The stacked experts of one layer with the same dtype and device, either plain or with DoRA.

    Attributes:
        names: the active experts, in the order of their blocks.
        columns: index of each expert among the layer's active adapters, which is its column in the scalings.
        num_columns: number of the layer's active adapters.
        ranks: rank of each expert.
        down: A, with the rank as the first axis.
        up: B transposed; `rank / groups` rows for a grouped convolution.
        scales: peft's `scaling` of each expert.
        biased: the experts with a `lora_bias`.
        kept: the parameters are views of the stack, which is used in later calls too; else it is a copy for one call.
        dora: DoRA experts. Their `scales` are 1, as their scaling is in their factors (see `layers/dora.py`).
        rank_expert: for each rank, the index of its expert; None if all ranks are equal.
        column_index: `columns` as a tensor; None if they are all columns in order.
    """

    names: tuple[str, ...]
    columns: tuple[int, ...]
    num_columns: int
    ranks: tuple[int, ...]
    down: Float[Tensor, "rank ..."]
    up: Float[Tensor, "rank_per_group out"]
    scales: Float[Tensor, " expert"]
    biased: tuple[str, ...]
    kept: bool
    dora: bool
    rank_expert: Tensor | None
    column_index: Tensor | None


class _ViewsOfStack(torch.autograd.Function):
    """The stack as a function of its experts' parameters, for autograd: their gradients are slices of its gradient."""

    @staticmethod
    def forward(ctx: Any, stack: tuple[Tensor], from_rows: _Rows, sizes: Sequence[int], *parameters: Tensor) -> Tensor:
        ctx.from_rows, ctx.sizes = from_rows, sizes
        # The stack shares the parameters' memory but not their version counters, so in-place changes are checked here.
        ctx.versions = [(parameter, parameter._version) for parameter in parameters]
        return stack[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if any(parameter._version != version for parameter, version in ctx.versions):
            raise RuntimeError("an expert's parameters were changed in place between the forward and its backward pass")
        return None, None, None, *(ctx.from_rows(block) for block in grads[0].split(ctx.sizes))


class StackedExperts:
    """The experts of one LoRA layer as stacks, one for each dtype and device, plain or DoRA; made on first use.

    Args:
        target: peft's LoRA layer.
        layout: the attributes of this kind of layer for its factors.
        allow_dora: accept DoRA experts.
    """

    def __init__(self, target: LoraLayer, layout: StorageLayout, *, allow_dora: bool = False) -> None:
        self.target = target
        self.layout = layout
        self.allow_dora = allow_dora
        self._forget()

    def _forget(self) -> None:
        """Drop the stacks, so that the next call makes new ones."""
        self._stacks: tuple[Stack, ...] = ()
        self._active: list[str] | None = None
        self._scaling: dict[str, float] = {}
        # The stacks are current while the contents of these dicts and the addresses of the parameters are unchanged.
        self._owners: list[dict[str, Any]] = []
        self._owned: list[int] = []
        self._kept: list[Any] = []  # references, so that no new object gets the id of one of them
        self._parameters: list[nn.Parameter] = []
        self._addresses: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy has its own parameters, and stacks them again.
        return {"target": self.target, "layout": self.layout, "allow_dora": self.allow_dora}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of the layer's active experts; empty if it has none.

        Each call checks that the stacks are current. A compiled graph cannot check: it uses the stacks of the last call
        that was not compiled (`generate` makes one for all layers before it starts).

        Raises:
            AdapterError: an active adapter uses DoRA and `allow_dora` is off, or another variant of LoRA.
        """
        if torch.compiler.is_compiling():
            usable = self._active is not None and not getattr(self.target, _FSDP, False)
            return self._stacks if usable else self._uncompiled()
        return self._stacks if self._is_current() else self._build(own=not parameters_may_be_wrapped())

    def refresh(self, *, own: bool = True) -> None:
        """Stack the experts again if their storage has changed.

        Nothing is done with FSDP and DeepSpeed. Their shards are complete only in a forward, and they need contiguous
        parameters, which B's transposed views of a stack are not.

        Args:
            own: make the stack the parameters' storage. If False, drop the stacks until the next call.
        """
        if self._is_current() or self.sharded or sharding_is_to_come():
            return
        if own:
            self._build(own)
        else:
            self._forget()

    def look(self) -> bool:
        """Check before the forward that the stacks are current; returns whether they were made again."""
        if self._is_current():
            return False
        before = self._stacks
        self.refresh(own=not parameters_may_be_wrapped())
        return self._stacks is not before

    @torch.compiler.disable
    def _uncompiled(self) -> tuple[Stack, ...]:
        return self.stacks()

    @property
    def sharded(self) -> bool:
        """Whether FSDP manages the parameters."""
        target: Any = self.target
        return any(getattr(module, _FSDP, False) for module in target.modules())

    @property
    def current(self) -> tuple[Stack, ...]:
        """The stacks of the last check."""
        return self._stacks

    def differentiable(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """The stack's (down, up), connected to the parameters by autograd if these are trained."""
        if not torch.is_grad_enabled():
            return stack.down, stack.up
        factors = []
        for storage, values in ((self.layout.down, stack.down), (self.layout.up, stack.up)):
            parameters = [storage.find(self.target, name) for name in stack.names]
            if any(parameter.requires_grad for parameter in parameters):
                sizes = [storage.to_rows(parameter).shape[0] for parameter in parameters]
                values = _ViewsOfStack.apply((values,), storage.from_rows, sizes, *parameters)
            factors.append(values)
        return factors[0], factors[1]

    def _is_current(self) -> bool:
        # This runs in every layer of every call. Access by public attributes would be ten times slower.
        if self._active != self.target.active_adapters or self._scaling != self.target.scaling:
            return False
        if [id(value) for dictionary in self._owners for value in dictionary.values()] != self._owned:
            return False
        return [parameter.data_ptr() for parameter in self._parameters] == self._addresses

    # Not in inference mode: its tensors cannot be trained later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, own: bool) -> tuple[Stack, ...]:
        target, layout = self.target, self.layout
        for storage in (layout.down, layout.up):
            # The adapters' modules are not called, so accelerate would not load offloaded parameters.
            keep_resident(getattr(target, storage.attribute), execution_device(target.get_base_layer()))
        active = list(target.active_adapters)
        present = list(getattr(target, layout.down.attribute).keys())
        for name in active:
            if name in present:
                refuse_variant(target, name, allow_dora=self.allow_dora)
        # Inactive experts are stacked too, else their views would keep the memory of an earlier stack.
        ordered = [name for name in active if name in present] + [name for name in present if name not in active]
        by_kind: dict[tuple[torch.dtype, torch.device, bool], list[str]] = {}
        for name in ordered:
            parameter = layout.down.find(target, name)
            kind = parameter.dtype, parameter.device, bool(target.use_dora.get(name, False))
            by_kind.setdefault(kind, []).append(name)

        stacks = []
        stacked = _take_over if own else _copy
        for names in by_kind.values():
            down = stacked(target, layout.down, names)
            up = stacked(target, layout.up, names)
            names = [name for name in names if name in active]
            if names:
                stacks.append(_stack(target, layout, names, active, down, up, kept=own))
        if not own:
            self._forget()
            return tuple(stacks)
        self._stacks = tuple(stacks)
        self._active = active
        self._scaling = dict(target.scaling)
        storages = (layout.down, layout.up)
        self._owners = [owner for storage in storages for owner in storage.owners(target)]
        self._kept = [value for dictionary in self._owners for value in dictionary.values()]
        self._owned = [id(value) for value in self._kept]
        self._parameters = [storage.find(target, name) for storage in storages for name in ordered]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        return self._stacks


def own_tensors(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A state dict hook for LoRA layers that replaces views of a stack by copies.

    safetensors and accelerate save only one of several tensors that share storage.
    """
    for key, value in state_dict.items():
        if key.startswith(f"{prefix}lora_") and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            state_dict[key] = value.clone(memory_format=torch.contiguous_format)


def refuse_variant(target: LoraLayer, name: str, *, allow_dora: bool) -> None:
    """Raise if adapter `name` is a variant of LoRA, except DoRA if it is allowed.

    Raises:
        AdapterError: it is such a variant.
    """
    dora = target.use_dora.get(name, False)
    if dora and not allow_dora:
        refuse_dora(name)
    variant = target.lora_variant.get(name)
    if variant is not None and not dora:
        raise AdapterError(
            f"adapter {name!r} uses the LoRA variant {type(variant).__name__}, which X-LoRA does not support: "
            "leave it out, or turn it into a plain LoRA with peft's convert_to_lora"
        )


def _copy(target: LoraLayer, storage: Storage, names: list[str]) -> Tensor:
    """Copy the parameters into one new tensor with the rank as the first axis."""
    for name in names:
        if storage.find(target, name).numel() == 0:
            raise AdapterError(
                f"expert {name!r} has an empty {storage.attribute} here, as ZeRO-3 leaves parameters outside of a call "
                "of the whole model: call that, not a part of it"
            )
    return torch.cat([storage.to_rows(storage.find(target, name)) for name in names])


def _take_over(target: LoraLayer, storage: Storage, names: list[str]) -> Tensor:
    """Copy the parameters into one new tensor with the rank as the first axis, and make them views of it."""
    parameters = [storage.find(target, name) for name in names]
    rows = [storage.to_rows(parameter) for parameter in parameters]
    stack = torch.cat(rows)
    for parameter, block in zip(parameters, stack.split([row.shape[0] for row in rows]), strict=True):
        parameter.data = storage.from_rows(block)
    return stack


def _stack(
    target: LoraLayer,
    layout: StorageLayout,
    names: list[str],
    active: list[str],
    down: Tensor,
    up: Tensor,
    *,
    kept: bool,
) -> Stack:
    """The stack of the first `names` in (down, up); the rows after them belong to inactive experts."""
    ranks = [layout.down.to_rows(layout.down.find(target, name)).shape[0] for name in names]
    up_rows = sum(layout.up.to_rows(layout.up.find(target, name)).shape[0] for name in names)
    columns = [active.index(name) for name in names]
    device = down.device
    wide = torch.promote_types(down.dtype, torch.float32)
    uniform = len(set(ranks)) == 1
    dora = bool(target.use_dora.get(names[0], False))
    all_columns = columns == list(range(len(active)))
    return Stack(
        names=tuple(names),
        columns=tuple(columns),
        num_columns=len(active),
        ranks=tuple(ranks),
        down=down[: sum(ranks)],
        up=up[:up_rows],
        biased=tuple(name for name in names if target.lora_bias[name]),
        kept=kept,
        dora=dora,
        scales=torch.tensor(
            [1.0 if dora else float(target.scaling[name]) for name in names], dtype=wide, device=device
        ),
        rank_expert=None
        if uniform
        else torch.arange(len(ranks), device=device).repeat_interleave(torch.tensor(ranks, device=device)),
        column_index=None if all_columns else torch.tensor(columns, device=device),
    )

"""The experts of one LoRA layer, stacked along their ranks, so that N experts cost two matrix products.

With A = [A_1; ...; A_N] ([rank, in]) and B = [B_1, ..., B_N] ([out, rank]), the sum of all experts is B (A x), and a
weight per expert acts on its block of the rank axis. The stack takes over the adapters' storage: peft's parameters
become views of it, so nothing is held twice, and what changes a parameter in place (loading, an optimizer) changes the
stack. What gives a parameter new storage (`.to()`, a cast, a deep copy) is noticed, at the next forward at the latest
(within eight tokens where it is one layer's in the midst of a text, see `decode_weights.py`), and stacked again. In
distributed training others keep parameters in storage of their own (FSDP's shards, ZeRO's flat buffers) and need them
to stay there: then the stack is a copy, made at every call.
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
from weft.distributed import others_have_parameters, sharding_is_to_come
from weft.errors import AdapterError

_Rows = Callable[[Tensor], Tensor]
# torch's mark on the modules whose parameters FSDP manages.
_FSDP = "_is_fsdp_managed_module"


@dataclass(frozen=True)
class Storage:
    """Where a kind of LoRA layer keeps one of its two factors, and how that looks with the rank as its first axis.

    Attributes:
        attribute: name of the layer's `ModuleDict` or `ParameterDict` of adapters.
        to_rows: parameter -> view with the rank first.
        from_rows: that view -> the parameter's own shape.
    """

    attribute: str
    to_rows: _Rows
    from_rows: _Rows

    def find(self, target: LoraLayer, name: str) -> nn.Parameter:
        """The parameter of adapter `name`; KeyError where the layer has none."""
        container = getattr(target, self.attribute)
        return cast(nn.Parameter, container[name].weight if isinstance(container, nn.ModuleDict) else container[name])

    def owners(self, target: LoraLayer) -> list[dict[str, Any]]:
        """The dictionaries on the way to the parameters of all adapters."""
        container = getattr(target, self.attribute)
        if not isinstance(container, nn.ModuleDict):
            return [container._parameters]
        return [cast(dict, container._modules), *(cast(dict, module._parameters) for module in container.values())]


def as_it_is(weight: Tensor) -> Tensor:
    """For factors that have the rank as their first axis."""
    return weight


def transposed(weight: Tensor) -> Tensor:
    """For factors `[out, rank]`, and back."""
    return weight.T


@dataclass(frozen=True)
class StorageLayout:
    """The two factors of a kind of LoRA layer: A (down to the rank) and B (up from it)."""

    down: Storage
    up: Storage


@dataclass(frozen=True)
class Stack:
    """Some experts of one layer (those of one dtype and device, plain or with DoRA), stacked.

    Attributes:
        names: the active experts, in the order of their blocks.
        columns: each one's index among the layer's active adapters, which is its column in the scalings.
        num_columns: how many active adapters the layer has.
        ranks: each one's rank.
        down: A, the rank first, then the input axes.
        up: B transposed. A grouped convolution has `rank / groups` rows.
        scales: peft's `scaling` of each.
        biased: those with a `lora_bias`.
        kept: the parameters live in it, and it is the same in the next call; else it is a copy for this one.
        dora: they are DoRA experts, whose `scales` are 1: their own scaling is in their factors (see `layers/dora.py`).
        rank_expert: for each rank, the expert it belongs to; None where all ranks are equal.
        column_index: `columns` as a tensor; None where they are all columns in order.
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
    """The stack, seen by autograd as made of its experts' parameters: their gradients are slices of its own."""

    @staticmethod
    def forward(ctx: Any, stack: tuple[Tensor], from_rows: _Rows, sizes: Sequence[int], *parameters: Tensor) -> Tensor:
        ctx.from_rows, ctx.sizes = from_rows, sizes
        # The stack shares the parameters' memory but not their version counters, by which autograd notices changes.
        ctx.versions = [(parameter, parameter._version) for parameter in parameters]
        return stack[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if any(parameter._version != version for parameter, version in ctx.versions):
            raise RuntimeError("an expert's parameters were changed in place between the forward and its backward pass")
        return None, None, None, *(ctx.from_rows(block) for block in grads[0].split(ctx.sizes))


class StackedExperts:
    """The experts of one LoRA layer as stacks, one per dtype and device (and for DoRA), made on first use.

    Args:
        target: peft's LoRA layer.
        layout: where this kind of layer keeps its factors.
        allow_dora: take DoRA experts too.
    """

    def __init__(self, target: LoraLayer, layout: StorageLayout, *, allow_dora: bool = False) -> None:
        self.target = target
        self.layout = layout
        self.allow_dora = allow_dora
        self._forget()

    def _forget(self) -> None:
        """Begin anew at the next call."""
        self._stacks: tuple[Stack, ...] = ()
        self._active: list[str] | None = None
        self._scaling: dict[str, float] = {}
        # What must be as it was for the stacks to hold: what is in these dictionaries, and the parameters' addresses.
        self._owners: list[dict[str, Any]] = []
        self._owned: list[int] = []
        self._kept: list[Any] = []  # so that no other object gets the id of one of them
        self._parameters: list[nn.Parameter] = []
        self._addresses: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy's parameters are copies of their own: it stacks them again.
        return {"target": self.target, "layout": self.layout, "allow_dora": self.allow_dora}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of the active experts that this layer has; empty where it has none of them.

        Whether they still hold is looked up at every call. A compiled graph cannot look: it has the stacks of the last
        call that was not compiled (`generate` makes one for all layers before it starts).

        Raises:
            AdapterError: an active adapter is no plain LoRA, nor one with DoRA where that is allowed.
        """
        if torch.compiler.is_compiling():
            ours = self._active is not None and not getattr(self.target, _FSDP, False)
            return self._stacks if ours else self._uncompiled()
        return self._stacks if self._still_ours() else self._build(own=not others_have_parameters())

    def refresh(self, *, own: bool = True) -> None:
        """Stack again where the storage has changed; not where FSDP has it, which is whole in the forward only.

        Args:
            own: the stack becomes the parameters' storage, or else nothing is stacked until the next call. (Never
                where FSDP or DeepSpeed is to come, which take contiguous parameters only: B's, which lie transposed in
                a stack, are none.)
        """
        if self._still_ours() or self.sharded or sharding_is_to_come():
            return
        if own:
            self._build(own)
        else:
            self._forget()

    def look(self) -> bool:
        """Look ahead of the forward whether the stacks hold; whether they are others now."""
        if self._still_ours():
            return False
        before = self._stacks
        self.refresh(own=not others_have_parameters())
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
        """The stacks as they were last looked up."""
        return self._stacks

    def differentiable(self, stack: Stack) -> tuple[Tensor, Tensor]:
        """The stack's (down, up) as autograd should see them: leaves where the experts are frozen."""
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

    def _still_ours(self) -> bool:
        # This runs in every layer of every call: no public access, which is ten times slower.
        if self._active != self.target.active_adapters or self._scaling != self.target.scaling:
            return False
        if [id(value) for dictionary in self._owners for value in dictionary.values()] != self._owned:
            return False
        return [parameter.data_ptr() for parameter in self._parameters] == self._addresses

    # Not in inference mode, whose tensors could never be trained on.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _build(self, own: bool) -> tuple[Stack, ...]:
        target, layout = self.target, self.layout
        for storage in (layout.down, layout.up):
            # A stack reads its parameters, which have no forward that would bring them back from an offload.
            keep_resident(getattr(target, storage.attribute), execution_device(target.get_base_layer()))
        active = list(target.active_adapters)
        present = list(getattr(target, layout.down.attribute).keys())
        for name in active:
            if name in present:
                refuse_variant(target, name, allow_dora=self.allow_dora)
        # Inactive experts move along, or they would keep the storage of an earlier stack alive.
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
    """A state dict hook for LoRA layers: copies in the place of views of a stack.

    Tools that save state dicts (safetensors, accelerate) take tensors that share storage for one and drop the others.
    """
    for key, value in state_dict.items():
        if key.startswith(f"{prefix}lora_") and isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            state_dict[key] = value.clone(memory_format=torch.contiguous_format)


def refuse_variant(target: LoraLayer, name: str, *, allow_dora: bool) -> None:
    """Raise where adapter `name` computes something else than B A x, or DoRA where that is allowed."""
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
    """The parameters in one new tensor, rank first."""
    for name in names:
        if storage.find(target, name).numel() == 0:
            raise AdapterError(
                f"expert {name!r} has an empty {storage.attribute} here, as ZeRO-3 leaves parameters outside of a call "
                "of the whole model: call that, not a part of it"
            )
    return torch.cat([storage.to_rows(storage.find(target, name)) for name in names])


def _take_over(target: LoraLayer, storage: Storage, names: list[str]) -> Tensor:
    """Copy the parameters into one new tensor, rank first, and make them views of it."""
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
    """The stack of the leading `names` of (down, up); what follows them belongs to inactive experts."""
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

"""Full base-model weights in adapters: embeddings of new tokens, heads, norms.

peft saves such weights with an adapter if the vocabulary was resized, if a module was trained fully
(`modules_to_save`), or if rows of an embedding were trained (`trainable_token_indices`). They replace weights of the
base model, which the mixture has only once. So all experts with such a weight must have the same values; otherwise the
mixture is refused.

These weights replace the base model's own parameters while the mixture is on. `disable_adapter()` and `unload()`
restore the base model's parameters. Each expert is saved with its weights, as an ordinary adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.base_model.devices import offloaded_weights
from weft.checkpoint.adapter_keys import KEY_PREFIX, OF_LAYER, TOKEN_LAYER, TOKEN_ROWS, fitted
from weft.checkpoint.adapters import Adapter
from weft.distributed import is_sharded
from weft.errors import AdapterError, ConfigError, bullet_list
from weft.files.reading import shown
from weft.files.tensors import not_finite
from weft.model.heads import find_heads
from weft.model.inject import converted, of_another_base


@dataclass(frozen=True)
class _Place:
    """A parameter to replace: the module and attribute, the base model's own value and the experts' value."""

    owner: nn.Module
    attribute: str
    own: nn.Parameter
    brought: nn.Parameter


class Retrained:
    """The full base-model weights in the adapters of a mixture. The base model is not changed before `use`.

    Args:
        base: the base model, without adapters.
        adapters: the adapters; their full weights are moved from `weights` to `heads`.
        backbone: the backbone of the base model; None if the mixture cannot have heads.

    Raises:
        AdapterError: the weights of two adapters differ, do not fit, or overflow in the base model's dtype.
    """

    def __init__(self, base: Any, adapters: Sequence[Adapter], backbone: nn.Module | None = None) -> None:
        self._base = base
        self._parameters: dict[str, nn.Parameter] = dict(base.named_parameters(remove_duplicate=False))
        self._places: dict[str, _Place] = {}
        self._own_vocabulary = _vocabulary(base)
        brought = {adapter.name: self._brought(adapter) for adapter in adapters}
        wanted: dict[str, Tensor] = {}
        problems: list[str] = []
        for name in dict.fromkeys(name for one in brought.values() for name in one):
            owners = {adapter: one[name] for adapter, one in brought.items() if name in one}
            first, *others = owners.values()
            if all(torch.equal(first, other) for other in others):
                wanted[name] = first
            else:
                problems.append(self._difference(name, list(owners), backbone))
        made: dict[tuple[int, int], nn.Parameter] = {}
        for name, value in () if problems else wanted.items():
            problems += self._problems(name, value)
            if not problems:
                # Tied parameters with equal new values stay tied.
                tie = (
                    id(self._parameters[name]),
                    next(
                        number
                        for number, other in enumerate(wanted)
                        if self._parameters[other] is self._parameters[name] and torch.equal(wanted[other], value)
                    ),
                )
                made.setdefault(tie, self._parameter(name, value))
                path, _, attribute = name.rpartition(".")
                owner = base.get_submodule(path)
                self._places[name] = _Place(owner, attribute, self._parameters[name], made[tie])
        if not problems:
            problems += self._overflows() or self._vocabulary_problems()
        if problems:
            who = ", ".join(repr(name) for name, one in brought.items() if one)
            made_for = [of_another_base(base, adapter) for adapter in adapters if brought[adapter.name]]
            raise AdapterError(
                f"{''.join(made_for)}the adapters cannot be experts of one model, because of the base model's weights "
                f"in {who}:{bullet_list(problems)}"
            )

    def __bool__(self) -> bool:
        return bool(self._places)

    def use(self, brought: bool) -> None:
        """Put the experts' weights (True) or the base model's own (False) into the base model."""
        for place in self._places.values():
            present = getattr(place.owner, place.attribute)
            wanted = place.brought if brought else place.own
            if present is wanted:
                continue
            # A parameter that was not in the model was not moved with it.
            wanted.data = wanted.data.to(present.device, present.dtype)
            setattr(place.owner, place.attribute, wanted)
            _tell_size(place.owner, wanted)
        embedding = next((p for name, p in self._places.items() if name in self._embeddings()[:1]), None)
        if embedding is not None and self._own_vocabulary is not None:
            _set_vocabulary(self._base, len(embedding.brought) if brought else self._own_vocabulary)

    def modules(self) -> dict[str, nn.Module]:
        """name -> module, for the modules with replaced parameters."""
        return {name.rpartition(".")[0]: place.owner for name, place in self._places.items()}

    # ------------------------------------------------------------------ the weights of one adapter

    def _brought(self, adapter: Adapter) -> dict[str, Tensor]:
        """Parameter name -> new value, for one adapter."""
        keys = {key: value for key, value in adapter.weights.items() if ".lora_" not in key}
        names = self._names(adapter, keys)
        full: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        for key, name in names.items():
            value = adapter.weights.pop(key)
            if OF_LAYER in key and TOKEN_LAYER not in key and self._is_own(name, value):
                continue  # a copy of the base weight, which peft adds if LoRA adapts the embeddings
            adapter.heads[key] = value
            (rows if TOKEN_ROWS in key else full)[name] = value
        for name in list(full):
            resized = full[name].shape[:1] != self._parameters[name].shape[:1]
            if resized or getattr(adapter.config, "ensure_weight_tying", False):
                for other in self._tied(name):
                    full.setdefault(other, full[name])
        for name, value in rows.items():
            indices = _token_indices(adapter, name)
            whole = full.get(name, self._own(name))
            if whole is None or not indices or not _are_rows(value, indices, whole):
                rows_here = None if whole is None else len(whole)
                raise AdapterError(
                    f"adapter {adapter.name!r} trains {len(value) if value.dim() else 0} rows of {name} "
                    f"(trainable_token_indices {shown(indices)}), of which this base model has {rows_here}: add the "
                    "tokens that it was trained with, by model.resize_token_embeddings"
                )
            whole = whole.clone()
            whole[indices] = value.to(whole)
            for other in (name, *self._tied(name)):
                full[other] = whole
        return full

    def _names(self, adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """key -> parameter name in the base model, for the keys that belong to a parameter."""
        found: dict[str, str] = {}
        for key in tensors:
            plain = key.replace(TOKEN_ROWS, ".weight").replace(TOKEN_LAYER, ".").replace(OF_LAYER, ".")
            expected = {f"{KEY_PREFIX}{name}": parameter for name, parameter in self._parameters.items()}
            renamed = fitted({plain: tensors[key]}, expected)
            if not renamed.keys() & expected.keys():
                renamed = converted(self._base, adapter, {plain: tensors[key]})
            (name,) = renamed if len(renamed) == 1 else ("",)
            name = name.removeprefix(KEY_PREFIX)
            if name in self._parameters:
                found[key] = name
        return found

    def _own(self, name: str) -> Tensor | None:
        """The base model's own value on the CPU; None if it is on the meta device."""
        own: Tensor = self._parameters[name]
        if own.is_meta:
            path, _, attribute = name.rpartition(".")
            offloaded = offloaded_weights(self._base.get_submodule(path)).get(attribute)
            return None if offloaded is None else offloaded.cpu()
        return own.detach().cpu()

    def _is_own(self, name: str, value: Tensor) -> bool:
        own = self._own(name)
        if own is None or own.shape != value.shape:
            return False
        return torch.equal(own.to(value.dtype), value) or torch.equal(value.to(own.dtype), own)

    def _tied(self, name: str) -> list[str]:
        """The other names of a parameter."""
        own = self._parameters[name]
        return [other for other, parameter in self._parameters.items() if parameter is own and other != name]

    # ------------------------------------------------------------------ checks

    def _difference(self, name: str, adapters: list[str], backbone: nn.Module | None) -> str:
        module = name.rpartition(".")[0]
        way_out = (
            "leave all but one of these adapters out, or train them with the same one (on a base model that has it)"
        )
        try:
            if backbone is not None and find_heads(self._base, backbone, [module]):
                way_out = f"let the mixture train one of its own, by heads=[{module!r}], or {way_out}"
        except ConfigError:
            pass  # this module cannot be a head
        return f"{adapters} each contain their own {name}, and these differ, but a mixture has one: {way_out}"

    def _problems(self, name: str, value: Tensor) -> list[str]:
        own = self._parameters[name]
        if is_sharded(own) or own.is_meta or type(own) is not nn.Parameter or not own.is_floating_point():
            state = "offloaded or sharded" if own.is_meta or is_sharded(own) else f"quantised ({type(own).__name__})"
            return [
                f"they contain their own {name}, which is {state} in this base model and cannot be replaced: load the "
                "base model so that this module is not"
            ]
        shape = list(own.shape)
        if name in self._embeddings():
            shape[0] = len(value)
        if list(value.shape) != shape:
            return [f"they contain {name} of shape {list(value.shape)}, expected {list(own.shape)}"]
        return []

    def _parameter(self, name: str, value: Tensor) -> nn.Parameter:
        own = self._parameters[name]
        return nn.Parameter(value.detach().to(own.device, own.dtype, copy=True), requires_grad=False)

    def _overflows(self) -> list[str]:
        broken = not_finite({name: place.brought for name, place in self._places.items()})
        return [] if broken is None else [f"in this base model {broken}: load it in a wider dtype"]

    def _vocabulary_problems(self) -> list[str]:
        """A problem if only one of the input and output embeddings would get another size."""
        names = [name for name in self._embeddings() if name.endswith("weight")]
        sizes = [len(self._places[name].brought if name in self._places else self._parameters[name]) for name in names]
        before = [len(self._parameters[name]) for name in names]
        if len(set(sizes)) < 2 or sizes == before:
            return []
        wanted = max(sizes)
        return [
            f"they hold embeddings of {wanted} tokens, but not all of {', '.join(names)}, of which this base model has "
            f"{before}: call model.resize_token_embeddings({wanted}) first"
        ]

    def _embeddings(self) -> list[str]:
        """The names of parameters with a row for each token: input and output embeddings."""
        modules = [_embedding(self._base, method) for method in ("get_input_embeddings", "get_output_embeddings")]
        paths = {id(module): path for path, module in self._base.named_modules()}
        return [
            f"{paths[id(module)]}.{attribute}"
            for module in modules
            if id(module) in paths
            for attribute in ("weight", "bias")
            if f"{paths[id(module)]}.{attribute}" in self._parameters
        ]


def _are_rows(value: Tensor, indices: list[int], whole: Tensor) -> bool:
    """Whether `value` has the shape of the rows `indices` of `whole`."""
    inside = min(indices) >= 0 and max(indices) < len(whole)
    return inside and list(value.shape) == [len(indices), *whole.shape[1:]]


def _token_indices(adapter: Adapter, name: str) -> list[int] | None:
    """The rows of this embedding that an adapter trains."""
    indices = adapter.config.trainable_token_indices
    if isinstance(indices, dict):
        module = name.rpartition(".")[0]
        return next((rows for layer, rows in indices.items() if f".{module}".endswith(f".{layer}")), None)
    return indices


def _embedding(base: Any, method: str) -> nn.Module | None:
    """The input or output embeddings; None if the model has none, such as an image model."""
    try:
        return getattr(base, method, lambda: None)()
    except NotImplementedError:
        return None


def _tell_size(owner: nn.Module, weight: Tensor) -> None:
    if isinstance(owner, nn.Embedding):
        owner.num_embeddings = len(weight)
    elif isinstance(owner, nn.Linear):
        owner.out_features = len(weight)


def _vocabulary(base: Any) -> int | None:
    config: Any = getattr(base, "config", None)
    return getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None


def _set_vocabulary(base: Any, size: int) -> None:
    """Set the vocabulary size, which the loss uses, as transformers does when it resizes embeddings."""
    base.config.get_text_config().vocab_size = size
    if hasattr(base, "vocab_size"):
        base.vocab_size = size

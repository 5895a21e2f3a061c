"""The heads of a mixture: modules outside of the backbone that are trained and saved with the gate (option `heads`).

A mixture has one head for all experts, as their outputs are mixed in earlier layers. Experts may have their own heads
(peft's `modules_to_save`, which peft always adds for classification). These stay in the experts' files, but are not
used in the mixture. If all of them are equal, the mixture's head is initialised from them, else from the base model.

The head is in peft's wrapper, so that peft saves and loads it, and `disable_adapter()` uses the base model's head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.config import PeftConfig
from peft.utils import PeftType, TaskType
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from weft.checkpoint.adapter_keys import KEY_PREFIX
from weft.checkpoint.adapters import Adapter
from weft.errors import AdapterError, ConfigError, bullet_list
from weft.model.inject import key_problems


def find_heads(base: nn.Module, backbone: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The full names of the heads in the base model.

    Args:
        base: the base model, without adapters.
        backbone: its backbone.
        names: full names of modules, or the last parts of them.

    Raises:
        ConfigError: there is no such module, or it is in the backbone or shares parameters with it.
    """
    inside, shared = set(backbone.modules()), {id(parameter) for parameter in backbone.parameters()}
    found: list[str] = []
    for name in names or ():
        modules = {path: module for path, module in base.named_modules() if f".{path}".endswith(f".{name}")}
        outside = {path: module for path, module in modules.items() if module not in inside}
        if not outside:
            where = f"is inside of the backbone ({type(backbone).__name__})" if modules else "is no module's name"
            free = [path for path, module in base.named_children() if module is not backbone]
            raise ConfigError(
                f"heads has {name!r}, which {where} of {type(base).__name__}: expected modules outside of the "
                f"backbone, such as {free}"
            )
        for path, module in outside.items():
            if backbone in module.modules() or any(id(parameter) in shared for parameter in module.parameters()):
                raise ConfigError(
                    f"heads has {name!r}, which shares parameters with the backbone ({type(backbone).__name__}) that "
                    "the gate reads: expected a module with parameters of its own"
                )
            found.append(path)
    return list(dict.fromkeys(found))


def refuse_task_of_peft(config: PeftConfig) -> None:
    """Raise if `get_peft_model` builds the model with a class of peft that needs `modules_to_save`.

    Raises:
        ConfigError: the task has such a class.
    """
    if config.peft_type is PeftType.XLORA and config.task_type in (TaskType.TOKEN_CLS, TaskType.QUESTION_ANS):
        raise ConfigError(
            f"task_type ({config.task_type}) must be left out with get_peft_model, whose class for it needs "
            "modules_to_save: name the head in heads, or use weft.from_adapters"
        )


def add_heads(
    base: nn.Module, paths: Sequence[str], adapters: list[Adapter], mixture_name: str, *, inference_mode: bool
) -> None:
    """Wrap the heads, and initialise them from the experts' heads if those are equal.

    Args:
        base: the base model, with its adapters.
        paths: full names of the heads.
        adapters: the experts.
        mixture_name: peft's name of the mixture.
        inference_mode: freeze the heads.

    Raises:
        ConfigError: a head has LoRA layers.
        AdapterError: the experts' common head does not fit the base model.
    """
    for path in paths:
        module = base.get_submodule(path)
        adapted = next((name for name, _ in module.named_parameters() if "lora_" in name), None)
        if adapted is not None:
            raise ConfigError(
                f"heads has {path!r}, which the experts adapt ({adapted}): it cannot be trained as a whole too. Leave "
                "it out of heads"
            )
        wrapper = ModulesToSaveWrapper(module, mixture_name)
        common = _common(path, adapters)
        if common is not None:
            own = wrapper.modules_to_save[mixture_name]
            problems = key_problems(common, own.state_dict())
            if problems:
                raise AdapterError(
                    f"the experts' own {path!r} does not fit the base model: load it with as many labels as they have "
                    f"(num_labels):{bullet_list(problems)}"
                )
            own.load_state_dict(common)
        parent, _, attribute = path.rpartition(".")
        setattr(base.get_submodule(parent), attribute, wrapper)
    switch_heads(base, mixture_name, inference_mode=inference_mode)


def switch_heads(base: nn.Module, mixture_name: str, *, inference_mode: bool) -> None:
    """Activate the mixture's heads; they are trainable unless `inference_mode`."""
    for _, wrapper in wrappers(base):
        wrapper.set_adapter(mixture_name, inference_mode=inference_mode)


def wrappers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, wrapper) of all heads."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            yield path, module


def head_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of the mixture's heads, under peft's keys."""
    # The first entry is the mixture's head, the others are frozen copies.
    heads = {path: next(iter(wrapper.modules_to_save.values())) for path, wrapper in wrappers(model)}
    return {f"{path}.{key}": value for path, head in heads.items() for key, value in head.state_dict().items()}


def _common(path: str, adapters: list[Adapter]) -> dict[str, Tensor] | None:
    """The tensors of the experts' heads at this path if all are equal; None if there are none or they differ."""
    prefix = f"{KEY_PREFIX}{path}."
    own = [
        {key.removeprefix(prefix): value for key, value in adapter.heads.items() if key.startswith(prefix)}
        for adapter in adapters
    ]
    own = [tensors for tensors in own if tensors]
    first = own[0] if own else None
    for other in own[1:]:
        if (
            first is None
            or other.keys() != first.keys()
            or not all(torch.equal(other[key], first[key]) for key in first)
        ):
            return None
    return first

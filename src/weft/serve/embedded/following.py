"""Applies the options of a request to the model: the gate, fixed weights, one expert, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from weft.model.model import at_own_weight
from weft.serve.requests import Choice


@contextmanager
def following(model: Any, choice: Choice) -> Iterator[None]:
    """In this block, the model uses the options of a request.

    Args:
        model: a mixture.
        choice: the options.

    Example:
        >>> with following(model, served.choice("my-mixture:law")):
        ...     model.generate(input_ids)
    """
    names = model.xlora_config.expert_names
    with ExitStack() as stack:
        if choice.alone == "":
            stack.enter_context(model.disable_adapter())
        elif choice.alone is not None:
            stack.enter_context(at_own_weight(model, {choice.alone: 1.0}))
        else:
            stack.enter_context(_options_kept(model))
            if choice.top_k is not None:
                model.set_topk_lora(choice.top_k)
            if choice.global_weight is not None:
                model.set_global_scaling_weight(choice.global_weight)
            if choice.weights is not None:
                stack.enter_context(model.fixed_scalings(dict(zip(names, choice.weights, strict=True))))
        yield


@contextmanager
def _options_kept(model: Any) -> Iterator[None]:
    """Restore `top_k_lora` and `global_scaling_weight` at the end of the block."""
    options = model.xlora_config
    top_k, weight = options.top_k_lora, options.global_scaling_weight
    try:
        yield
    finally:
        model.set_topk_lora(top_k)
        model.set_global_scaling_weight(weight)

"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes, before it looks for a class."""

from __future__ import annotations

PREFIX = "Weft"


def register() -> None:
    """Let vLLM know a class with a mixture in it for each of its text-generation models, by name; none is imported."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    for architecture in _TEXT_GENERATION_MODELS:
        ModelRegistry.register_model(f"{PREFIX}{architecture}", f"weft.serve.model:{PREFIX}{architecture}")

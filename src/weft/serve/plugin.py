"""The entry point `vllm.general_plugins`, which vLLM calls in each of its processes before it loads a model class."""

from __future__ import annotations

PREFIX = "Weft"


def register() -> None:
    """Register a class with a mixture for each of vLLM's text-generation models, by name; nothing is imported."""
    from vllm.model_executor.models.registry import _TEXT_GENERATION_MODELS, ModelRegistry

    for architecture in _TEXT_GENERATION_MODELS:
        ModelRegistry.register_model(f"{PREFIX}{architecture}", f"weft.serve.model:{PREFIX}{architecture}")

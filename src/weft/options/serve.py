"""The options of `weft serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weft.options.base import CommandOptions


@dataclass
class ServeOptions(CommandOptions):
    """Serve a trained mixture as an OpenAI server. Flags that are not below are vLLM's own and are handed on.

    Args:
        model: Folder or Hub id of a trained mixture.
        base: Folder or Hub id of the base model; null takes the one the mixture names.
        name: What clients call the model; null takes the folder's name.
        host: Address to listen on; others than this machine's own can be reached by others.
        port: Port to listen on.
        api_key: What clients must send as their key; null asks for none.
        engine: What runs the mixture: vllm, or embedded, which needs nothing but transformers and is for trying
            things; auto takes vLLM where it is installed.
    """

    model: str
    base: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    engine: Literal["auto", "vllm", "embedded"] = "auto"

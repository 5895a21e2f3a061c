"""The options of `weft serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weft.options.base import MixtureOptions


@dataclass
class ServeOptions(MixtureOptions):
    """Serve a trained mixture with an OpenAI-compatible API.

    Options that are not listed here are passed on to vLLM.

    Args: Model
        base (MODEL): Folder or Hub id of the base model. Default: the one that the mixture names.
        name (NAME): Model name that clients use. Default: the folder's name.

    Args: Server
        host (ADDRESS): Address to listen on. With 127.0.0.1, other machines cannot reach the server.
        port: Port to listen on.
        api_key (KEY): Key that clients must send. Default: none is required.
        engine: Engine that runs the mixture; auto uses vllm if it is installed, else embedded. The embedded engine
            needs only transformers, and is meant for trying a mixture out.
    """

    base: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    engine: Literal["auto", "vllm", "embedded"] = "auto"

    def wrong(self) -> list[str]:
        """An empty key."""
        return ["api_key ('') must not be empty: leave it out to ask for none"] if self.api_key == "" else []

    def models(self) -> list[tuple[str, str]]:
        """The mixture and its base model."""
        return [*super().models(), *([("base", self.base)] if self.base else [])]

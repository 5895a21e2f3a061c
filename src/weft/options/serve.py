"""The options of `weft serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from weft.options.base import MixtureOptions


@dataclass
class ServeOptions(MixtureOptions):
    """Serve a trained mixture with an OpenAI-compatible API.

    Options that are not listed here are vLLM's own and are handed on to it.

    Args: Model
        base (MODEL): Folder or Hub id of the base model. Default: the one that the mixture names.
        name (NAME): Model name that clients use. Default: the folder's name.

    Args: Server
        host (ADDRESS): Address to listen on. Other machines reach the server only at an address of this one's other
            than 127.0.0.1.
        port: Port to listen on.
        api_key (KEY): Key that clients must send. Default: none is asked for.
        engine: Engine that runs the mixture; auto takes vllm where it is installed, else embedded. The embedded engine
            needs transformers only, and is for trying things.
    """

    base: str | None = None
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    engine: Literal["auto", "vllm", "embedded"] = "auto"

    def wrong(self) -> list[str]:
        """A key that is none."""
        return ["api_key ('') must not be empty: leave it out to ask for none"] if self.api_key == "" else []

    def models(self) -> list[tuple[str, str]]:
        """The mixture and its base model."""
        return [*super().models(), *([("base", self.base)] if self.base else [])]

"""`weft serve` without vLLM: opens the port, loads the mixture, and runs the server."""

from __future__ import annotations

import socket
from types import FrameType
from typing import Any

import transformers
import uvicorn

from weft.checkpoint.adapters import local_folder
from weft.data.texts import num_positions
from weft.errors import ConfigError
from weft.files.reading import reason
from weft.generation.reader import tuner_of
from weft.generation.stream import end_tokens
from weft.model.build import base_name, load_mixture
from weft.options import ServeOptions
from weft.screen.visible import say
from weft.serve.embedded.app import About, make_app
from weft.serve.embedded.bodies import Reads
from weft.serve.embedded.engine import Engine
from weft.serve.embedded.metrics import Metrics
from weft.serve.mixture import scheme_of
from weft.serve.requests import Served

# The timeout is in seconds, for answers that are being generated at shutdown.
_UVICORN: dict[str, Any] = {
    "timeout_graceful_shutdown": 5,
    "log_level": "warning",
    "access_log": False,
    "ws": "none",
}
_ONE_BY_ONE = "one request at a time"
_TOGETHER = "requests that follow the gate in one batch (transformers' continuous batching), others one at a time"


def serve_embedded(options: ServeOptions) -> None:
    """Serve a mixture until the process gets a signal.

    Args:
        options: the options of `weft serve`.

    Raises:
        ConfigError: the mixture cannot be served, or the port cannot be opened.
        CheckpointError: the mixture or its base model cannot be read.
    """
    listening = _listen(options.host, options.port)
    try:
        engine, reads, about = load(options)
        try:
            host = f"[{options.host}]" if ":" in options.host else options.host
            url = f"http://{host}:{listening.getsockname()[1]}/v1"
            say(f"{announcement(reads.served, about)}; {url}; {_TOGETHER if engine.batch else _ONE_BY_ONE}")
            app = make_app(engine, reads, about, options.api_key)
            Server(uvicorn.Config(app, **_UVICORN), engine).run(sockets=[listening])
        finally:
            engine.close()
    finally:
        listening.close()


def announcement(served: Served, about: About) -> str:
    """The line that is printed at the start."""
    experts = f"{len(served.experts)} experts ({', '.join(served.experts)})"
    version = transformers.__version__
    return f"embedded engine (transformers {version}) serves {served.name}, {experts} of {about.base}: {about.scheme}"


def load(options: ServeOptions) -> tuple[Engine, Reads, About]:
    """Load the mixture; returns the engine, and the values for reading requests and for /v1/weft.

    Args:
        options: the options of `weft serve`.

    Raises:
        ConfigError, CheckpointError: as in `serve_embedded`.
    """
    folder = local_folder(options.model, "model")
    model, tokenizer = load_mixture(str(folder), options.base, "auto")
    model.eval()
    tuner = tuner_of(model)
    backbone, mixture = tuner.backbone, tuner.xlora_config
    if backbone.is_encoder_decoder or not backbone.caches:
        raise ConfigError(
            f"model ({options.model}) has a base ({type(backbone.base).__name__}) whose texts do not go on token by "
            "token with a cache of transformers' own, so the embedded engine cannot serve it: use model.generate"
        )
    served = Served(options.name or folder.resolve().name, tuple(mixture.expert_names or ()))
    ends = end_tokens(backbone.base.generation_config.eos_token_id)
    positions = num_positions(backbone.base.config)
    reads = Reads(
        served,
        tokenizer,
        num_tokens=len(backbone.base.get_input_embeddings().weight),
        positions=positions,
        characters=_characters(positions, tokenizer),
        text_ends=ends,
        chat_ends=ends | end_tokens(tokenizer.eos_token_id),
    )
    about = About(
        scheme=scheme_of(vars(mixture)),
        engine=f"embedded (transformers {transformers.__version__})",
        base=base_name(str(folder), options.base),
    )
    return Engine(model, tokenizer, Metrics(served.experts)), reads, about


def _characters(positions: int | None, tokenizer: Any) -> int | None:
    """The number of characters above which any text has more tokens than the model has positions."""
    if positions is None:
        return None
    # The tokenizer's normalizer can replace several characters by one.
    return 4 * positions * max(map(len, tokenizer.get_vocab()))


class Server(uvicorn.Server):
    """uvicorn's server, in which a signal also stops the engine.

    Args:
        config: uvicorn's config.
        engine: the engine.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine) -> None:
        super().__init__(config)
        self._engine = engine

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self._engine.stop()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    """Open a socket at this address; called before the model is loaded.

    Raises:
        ConfigError: it cannot be opened.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port ({port}) must be from 0 to 65535, where 0 takes a free one")
    family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, UnicodeError) as err:
        raise ConfigError(f"host ({host}) and port ({port}) cannot be listened on: {reason(err)}") from err

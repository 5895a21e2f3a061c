"""An ASGI middleware between clients and vLLM's server, for the options in `requests.py`.

It converts the options of a request to fields of vLLM: a line in `vllm_xargs`, and a `cache_salt`, as texts with
different options must not share cached prefixes. It refuses invalid options, and inserts names and shares into the
answers. API keys are checked by vLLM's own middleware, which runs after this one; requests without a valid key are
passed on to it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import vllm
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX, AuthenticationMiddleware
from vllm.v1.engine.exceptions import EngineDeadError

from weft.files.reading import read_json, shown
from weft.files.tensors import CONFIG_NAME
from weft.serve.answers import Answer, Rewritten, Shares
from weft.serve.mixture import scheme_of
from weft.serve.page import HEADERS, page
from weft.serve.prometheus import of_the_gate, written
from weft.serve.requests import FIELD, SHARES, Choice, RequestError, Served, cache_salt, refuse_beside_shares

_TEXTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_WITH_SHARES = _TEXTS[:2]
_PATIENCE = 5.0  # seconds
_EXTRAS = ("vllm_xargs", "extra_args")


class Front:
    """The middleware, for vLLM's flag `--middleware weft.serve.front.Front`.

    Args:
        app: vLLM's application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.server: Server | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, refuse it, or pass it on and change the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.server is None:  # vLLM creates the middleware before it has loaded the model
            self.server = Server(scope["app"].state)
        server = self.server
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = (scope["method"], path)
        if not server.allows(scope, path):
            await self.app(scope, receive, send)  # vLLM refuses it
        elif route == ("GET", "/"):
            await HTMLResponse(page(), headers=HEADERS)(scope, receive, send)
        elif route == ("GET", "/v1/weft"):
            await JSONResponse(server.description())(scope, receive, send)
        elif route == ("GET", "/v1/models"):
            await self.app(scope, receive, Rewritten(send, server.with_all_names))
        elif route == ("GET", "/metrics"):
            await self.app(scope, receive, Rewritten(send, server.with_gate))
        elif scope["method"] == "POST":
            await self._post(server, path, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _post(self, server: Server, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        kind = Headers(scope=scope).get("content-type", "").partition(";")[0]
        if kind and kind != "application/json" and path not in _TEXTS:
            await self.app(scope, receive, send)  # a form
            return
        raw = await _body(receive)
        if raw is None:
            return
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None  # vLLM reports the error
        if not isinstance(body, dict):
            await self.app(scope, _again(raw, receive), send)
            return
        try:
            _refuse_extras(body)
            answer = _choose(server, path, body)
        except RequestError as err:
            await JSONResponse(err.body(), err.status)(scope, receive, send)
            return
        # Encoded again, as the original bytes could be parsed differently by vLLM (duplicate keys).
        raw = json.dumps(body).encode()
        scope = {**scope, "headers": [*_without_length(scope), (b"content-length", str(len(raw)).encode())]}
        try:
            await self.app(scope, _again(raw, receive), answer.sent_by(send) if answer else send)
        finally:
            if answer is not None and answer.shares is not None:
                await answer.shares.forget()


class Server:
    """The parts of vLLM's server that the middleware uses.

    Args:
        state: the state of vLLM's application.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.client = state.engine_client
        self.options = read_json(Path(state.vllm_config.additional_config[FIELD]) / CONFIG_NAME)
        name = state.openai_serving_models.base_model_paths[0].name
        self.served = Served(name, tuple(self.options["expert_names"]))
        keys = [key for key in (state.args.api_key or [envs.VLLM_API_KEY]) if key]
        app: Any = None  # not used: only verify_token is called
        self._guard = AuthenticationMiddleware(app, keys) if keys else None

    def allows(self, scope: Scope, path: str) -> bool:
        """Whether vLLM will accept a request: it has a valid key, or needs none."""
        if self._guard is None or not path.startswith(GUARDED_PREFIX):
            return True
        return self._guard.verify_token(Headers(scope=scope))

    def description(self) -> dict[str, Any]:
        """The answer of /v1/weft."""
        tokenizer = self.client.renderer.tokenizer
        return self.served.about(
            scheme=scheme_of(self.options),
            engine=f"vLLM {vllm.__version__}",
            base=self.state.args.model,
            chat=bool(self.state.args.chat_template or getattr(tokenizer, "chat_template", None)),
        )

    async def with_all_names(self, body: bytes) -> bytes:
        """Add the experts and the base model to vLLM's list of models."""
        models = json.loads(body)
        first = models["data"][0]
        models["data"] = [{**first, "id": name} for name in self.served.names()]
        return json.dumps(models).encode()

    async def with_gate(self, body: bytes) -> bytes:
        """Add the gate's metrics to vLLM's; unchanged if the engine does not answer in time."""
        try:
            answers = await asyncio.wait_for(self.ask_workers("weft_gate"), _PATIENCE)
        except (TimeoutError, EngineDeadError):
            return body
        sums = [sum(of_engines) for of_engines in zip(*(shares for shares, _ in answers), strict=True)]
        return body + written(of_the_gate(self.served.experts, sums, sum(tokens for _, tokens in answers))).encode()

    async def ask_workers(self, method: str, *args: Any) -> list[Any]:
        """Call a method in all workers; returns the result of the first worker of each engine, as they are equal."""
        call = self.client.engine_core.call_utility_all_async
        return [of_engine[0] for of_engine in await call("collective_rpc", method, None, args, None)]


def _choose(server: Server, path: str, body: dict[str, Any]) -> Answer | None:
    """Convert a request's body for vLLM, in place; returns the changes of the answer, or None.

    Raises:
        RequestError: an option is not valid.
    """
    if path not in _TEXTS:
        if FIELD in body:
            raise RequestError(f"weft is for {', '.join(_TEXTS)}", FIELD)
        return None  # other routes have only the mixture's name
    asked, served = body.get("model"), server.served
    choice = served.choice(asked, body.pop(FIELD, None))
    if choice.decides and body.get("use_beam_search"):
        raise RequestError("use_beam_search cannot be combined with weft's options, which vLLM's beams ignore", FIELD)
    salt = cache_salt(choice, _text_or_none(body, "cache_salt"))
    if salt is not None:
        body["cache_salt"] = salt
    extras = {}
    if choice.decides:
        extras[FIELD] = choice.written()
    shares = None
    if choice.shares:
        _refuse_shares(path, body)
        extras[SHARES] = uuid4().hex
        shares = Shares(
            server.ask_workers, served.experts, extras[SHARES], tokens_too=bool(body.get("return_token_ids"))
        )
        body["return_token_ids"] = True
    if extras:
        body["vllm_xargs"] = {**_object(body, "vllm_xargs"), **extras}
    if asked and asked != served.name:
        body["model"] = served.name
    return Answer(asked or served.name, shares) if choice != Choice() else None


def _refuse_shares(path: str, body: dict[str, Any]) -> None:
    if path not in _WITH_SHARES:
        raise RequestError(f"weft.shares is for {', '.join(_WITH_SHARES)}", f"{FIELD}.shares")
    prompt = body.get("prompt")
    refuse_beside_shares(
        n=(body.get("n") not in (None, 1), "1"),
        prompt=(isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int), "one text"),
        echo=(body.get("echo"), "false"),
        use_beam_search=(body.get("use_beam_search"), "false"),
    )


def _text_or_none(body: dict[str, Any], field: str) -> str | None:
    value = body.get(field)
    if value is not None and (not isinstance(value, str) or not value):
        raise RequestError(f"{field} ({shown(value)}) must be a text that is not empty", field)
    return value


def _object(body: dict[str, Any], field: str) -> dict[str, Any]:
    value = body.get(field) or {}
    if not isinstance(value, dict):
        raise RequestError(f"{field} ({shown(value)}) must be an object", field)
    return value


def _refuse_extras(body: dict[str, Any]) -> None:
    """Refuse a client's own `weft` in vLLM's fields for extra arguments, as it would have no cache salt.

    Raises:
        RequestError: there is one.
    """
    for values in _dicts(body):
        for name in _EXTRAS:
            extras = values.get(name)
            if isinstance(extras, dict) and (FIELD in extras or SHARES in extras):
                raise RequestError(f"{name} has weft: send it as the body's own field weft", name)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)


async def _body(receive: Receive) -> bytes | None:
    """The whole body of a request; None if the client has disconnected."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(raw: bytes, receive: Receive) -> Receive:
    """A `receive` that returns the body again, and then later messages."""
    messages = [{"type": "http.request", "body": raw, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _without_length(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]

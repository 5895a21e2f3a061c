"""What stands between clients and vLLM's server: an ASGI middleware that understands `requests.py`.

It turns a request's choice into what vLLM's engine takes (a line in `vllm_xargs`, and a `cache_salt`, or texts with
unlike choices would share cached prefixes), refuses what is not allowed, and puts names and shares into the answers.
Keys are checked by vLLM's own middleware, behind this one: nothing is told here that a key is needed for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import vllm
from starlette.datastructures import Headers
from starlette.responses import HTMLResponse, JSONResponse
from vllm import envs
from vllm.entrypoints.serve.middleware.authenticate import GUARDED_PREFIX, AuthenticationMiddleware
from vllm.v1.engine.exceptions import EngineDeadError

from weft.files import read_json
from weft.serve.answers import Answer, Rewritten, Shares
from weft.serve.mixture import scheme_of
from weft.serve.page import page
from weft.serve.requests import FIELD, SHARES, Choice, RequestError, Served, cache_salt
from weft.tensor_files import CONFIG_NAME

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_TEXTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_WITH_SHARES = _TEXTS[:2]
_PATIENCE = 5.0  # seconds
_EXTRAS = ("vllm_xargs", "extra_args")


class Front:
    """The middleware; vLLM is told of it by `--middleware weft.serve.front.Front`.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: Any) -> None:
        self.app = app
        self.server: Server | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or hand on a request and mend the answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope["app"].state
        if self.server is None or self.server.state is not state:
            self.server = Server(state)
        server = self.server
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = (scope["method"], path)
        if not server.allows(scope, path):
            await self.app(scope, receive, send)  # which refuses it
        elif route == ("GET", "/"):
            await HTMLResponse(page(), headers={"content-security-policy": "frame-ancestors 'none'"})(
                scope, receive, send
            )
        elif route == ("GET", "/v1/weft"):
            await JSONResponse(server.description())(scope, receive, send)
        elif route == ("GET", "/v1/models"):
            await self.app(scope, receive, Rewritten(send, server.with_all_names))
        elif route == ("GET", "/metrics"):
            more = await server.metrics()
            await self.app(scope, receive, Rewritten(send, lambda body: body + more))
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
            body = None  # vLLM says what is wrong with it
        if not isinstance(body, dict):
            await self.app(scope, _again(raw, receive), send)
            return
        try:
            _refuse_extras(body)
            answer = _choose(server, path, body)
        except RequestError as err:
            await JSONResponse(err.body(), err.status)(scope, receive, send)
            return
        # What vLLM reads is what was read here, also where the bytes could be read in two ways.
        raw = json.dumps(body).encode()
        scope = {**scope, "headers": [*_without_length(scope), (b"content-length", str(len(raw)).encode())]}
        try:
            await self.app(scope, _again(raw, receive), answer.sent_by(send) if answer else send)
        finally:
            if answer is not None and answer.shares is not None:
                await answer.shares.forget()


class Server:
    """What of vLLM's server is asked for.

    Args:
        state: of its application.
    """

    def __init__(self, state: Any) -> None:
        self.state = state
        self.client = state.engine_client
        self.folder = Path(state.vllm_config.additional_config[FIELD])
        self.options = read_json(self.folder / CONFIG_NAME)
        name = state.openai_serving_models.base_model_paths[0].name
        self.served = Served(name, tuple(self.options["expert_names"]))

    def allows(self, scope: Scope, path: str) -> bool:
        """Whether vLLM will let a request in: it has the key, or needs none."""
        keys = [key for key in (self.state.args.api_key or [envs.VLLM_API_KEY]) if key]
        if not keys or not path.startswith(GUARDED_PREFIX):
            return True
        app: Any = None  # that it would guard
        return AuthenticationMiddleware(app, keys).verify_token(Headers(scope=scope))

    def description(self) -> dict[str, Any]:
        """What runs here."""
        tokenizer = self.client.renderer.tokenizer
        return {
            "name": self.served.name,
            "experts": list(self.served.experts),
            "scheme": scheme_of(self.options),
            "engine": f"vLLM {vllm.__version__}",
            "base": self.state.args.model,
            "shares": True,
            "chat": bool(self.state.args.chat_template or getattr(tokenizer, "chat_template", None)),
        }

    def with_all_names(self, body: bytes) -> bytes:
        """vLLM's list of models, with each expert and the base."""
        models = json.loads(body)
        first = models["data"][0]
        models["data"] = [{**first, "id": name} for name in self.served.names()]
        return json.dumps(models).encode()

    async def metrics(self) -> bytes:
        """Lines for Prometheus; none where the engine does not answer."""
        sums, tokens = [0.0] * len(self.served.experts), 0
        try:
            answers = await asyncio.wait_for(self.ask_workers("weft_gate"), _PATIENCE)
        except (TimeoutError, EngineDeadError):
            return b""
        for of_expert, number in answers:
            sums, tokens = [left + right for left, right in zip(sums, of_expert, strict=True)], tokens + number
        lines = [
            "# HELP weft_gate_share Mean share of an expert over the tokens that the gate decided for.",
            "# TYPE weft_gate_share gauge",
        ]
        for expert, total in zip(self.served.experts, sums, strict=True):
            label = expert.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'weft_gate_share{{expert="{label}"}} {total / max(1, tokens)}')
        lines += [
            "# HELP weft_gate_tokens_total Tokens that the gate decided for.",
            "# TYPE weft_gate_tokens_total counter",
            f"weft_gate_tokens_total {tokens}",
        ]
        return ("\n".join(lines) + "\n").encode()

    async def ask_workers(self, method: str, *args: Any) -> list[Any]:
        """What the first worker of each engine answers: those of one engine know the same."""
        call = self.client.engine_core.call_utility_all_async
        return [of_engine[0] for of_engine in await call("collective_rpc", method, None, args, None)]


def _choose(server: Server, path: str, body: dict[str, Any]) -> Answer | None:
    """Turn a body into one that vLLM understands, in place; how its answer is to be mended, if it is.

    Raises:
        RequestError: it asks for what is not allowed.
    """
    if path not in _TEXTS:
        if FIELD in body:
            raise RequestError(f"weft is for {', '.join(_TEXTS)}", FIELD)
        return None  # vLLM knows no name here but the mixture's
    asked, served = body.get("model"), server.served
    choice = served.choice(asked, body.pop(FIELD, None))
    if choice.decides and body.get("use_beam_search"):
        raise RequestError("use_beam_search is for the mixture as it is: vLLM's beams know no options", FIELD)
    salt = cache_salt(choice, body.get("cache_salt") or None)
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
        body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), **extras}
    if asked and asked != served.name:
        body["model"] = served.name
    return Answer(asked or served.name, shares) if choice != Choice() else None


def _refuse_shares(path: str, body: dict[str, Any]) -> None:
    if path not in _WITH_SHARES:
        raise RequestError(f"weft.shares is for {', '.join(_WITH_SHARES)}", f"{FIELD}.shares")
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    for field, wrong, right in (
        ("n", body.get("n") not in (None, 1), "1"),
        ("prompt", several, "one text"),
        ("echo", body.get("echo"), "false"),
        ("use_beam_search", body.get("use_beam_search"), "false"),
    ):
        if wrong:
            raise RequestError(f"{field} must be {right} where weft.shares is true", field)


def _refuse_extras(body: dict[str, Any]) -> None:
    """A client does not write the engine's own line: it would bring no salt."""
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
    """All of a request; None where the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(raw: bytes, receive: Receive) -> Receive:
    """A request's body once more, and then what comes after it."""
    messages = [{"type": "http.request", "body": raw, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _without_length(scope: Scope) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]

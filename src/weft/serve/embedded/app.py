"""The routes of the embedded engine: OpenAI's, and a few of weft's own."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from weft.files.reading import parse_json, shown
from weft.serve.embedded.answers import Answers, error_body, error_event
from weft.serve.embedded.bodies import Reads, Wanted, read_body
from weft.serve.embedded.engine import Engine
from weft.serve.embedded.generating import Piece
from weft.serve.embedded.metrics import CONTENT_TYPE
from weft.serve.embedded.tickets import Delivered, Ticket
from weft.serve.page import HEADERS, page
from weft.serve.requests import RequestError

_MOST_BYTES = 32 * 2**20  # maximum size of a body
_LARGE = 2**18  # size in bytes from which bodies are read one after the other


@dataclass(frozen=True)
class About:
    """Values for the answer of /v1/weft.

    Attributes:
        scheme: the passes of the mixture (`scheme_of`).
        engine: name and version of the engine.
        base: the base model's name.
    """

    scheme: str
    engine: str
    base: str


def make_app(engine: Engine, reads: Reads, about: About, api_key: str | None = None) -> FastAPI:
    """Make the ASGI application, for uvicorn.

    Args:
        engine: generates the texts.
        reads: for reading requests.
        about: for /v1/weft.
        api_key: the key that clients must send; None for no key.

    Example:
        >>> uvicorn.run(make_app(engine, reads, about))
    """
    # FastAPI's documentation pages would load scripts from other servers.
    app = FastAPI(lifespan=_closing(engine), docs_url=None, redoc_url=None, openapi_url=None)
    routes = Routes(engine, reads, about)
    for path, method, function in (
        ("/v1/models", "GET", routes.models),
        ("/v1/models/{name:path}", "GET", routes.model),
        ("/v1/completions", "POST", routes.completions),
        ("/v1/chat/completions", "POST", routes.chats),
        ("/v1/weft", "GET", routes.about),
        ("/health", "GET", routes.health),
        ("/metrics", "GET", routes.metrics),
        ("/", "GET", routes.page),
    ):
        app.add_route(path, function, methods=[method])
    app.add_exception_handler(HTTPException, _as_openai)
    app.add_middleware(Guard, engine=engine, api_key=api_key)
    return app


class Routes:
    """The functions of the routes.

    Args:
        engine, reads, about: as in `make_app`.
    """

    def __init__(self, engine: Engine, reads: Reads, about: About) -> None:
        self._engine, self._reads, self._about = engine, reads, about
        self._created = int(time.time())
        self._large = asyncio.Lock()

    async def models(self, request: Request) -> Response:
        """/v1/models: all model names."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._reads.served.names()]})

    async def model(self, request: Request) -> Response:
        """/v1/models/NAME: one model name."""
        name = request.path_params["name"]
        try:
            self._reads.served.choice(name)
        except RequestError as err:
            return JSONResponse(err.body(), err.status)
        return JSONResponse(self._model(name))

    async def completions(self, request: Request) -> Response:
        """/v1/completions."""
        return await self._answer(request, chat=False)

    async def chats(self, request: Request) -> Response:
        """/v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def about(self, request: Request) -> Response:
        """/v1/weft: what is served."""
        chat = self._reads.tokenizer.chat_template is not None
        return JSONResponse(self._reads.served.about(**vars(self._about), chat=chat))

    async def health(self, request: Request) -> Response:
        """/health: whether the engine runs."""
        return Response(status_code=200 if self._engine.alive else 503)

    async def metrics(self, request: Request) -> Response:
        """/metrics: for Prometheus."""
        written = self._engine.metrics.written(running=self._engine.running, waiting=self._engine.waiting)
        return PlainTextResponse(written, media_type=CONTENT_TYPE)

    async def page(self, request: Request) -> Response:
        """/: the page for a browser."""
        return HTMLResponse(page(), headers=HEADERS)

    def _model(self, name: str) -> dict[str, Any]:
        parent = None if name == self._reads.served.name else self._reads.served.name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "weft",
            "root": self._about.base,
            "parent": parent,
            "max_model_len": self._reads.positions,
        }

    async def _answer(self, request: Request, *, chat: bool) -> Response:
        try:
            raw = await _body(request)
            # In a thread, as the tokenization of long texts takes long. Large bodies one at a time, to limit memory.
            async with self._large if len(raw) > _LARGE else nullcontext():
                wanted = await asyncio.to_thread(_read, raw, self._reads, chat=chat)
            del raw
            return await self._answered(request, wanted)
        except (ClientGone, ClientDisconnect):
            return Response(status_code=499)  # not received by the client
        except Exception as err:  # any error of this request becomes its answer
            status, error = error_body(err)
            return JSONResponse(error, status)

    async def _answered(self, request: Request, wanted: Wanted) -> Response:
        delivered: asyncio.Queue[Delivered] = asyncio.Queue()
        ticket = self._engine.submit(wanted, _into(delivered))
        answers = Answers(wanted, self._reads.tokenizer)
        streams = False
        try:
            # Before the first piece, an error can still set the status, also for a stream.
            first = _piece(await _unless_gone(request, delivered.get()))
            if wanted.stream:
                streams = True
                return Stream(_parts(first, delivered, answers), ticket)
            return JSONResponse(answers.whole(await _unless_gone(request, _all(first, delivered))))
        finally:
            if not streams:
                ticket.cancel()


class Stream(StreamingResponse):
    """A streamed answer. If the client disconnects, the request is cancelled.

    Args:
        parts: the events.
        ticket: the ticket of the request.
    """

    def __init__(self, parts: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._ticket = ticket

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()


class ClientGone(Exception):
    """The client has disconnected."""


class Guard:
    """Middleware that checks the API key and counts answers.

    Args:
        app: the application.
        engine: has the metrics.
        api_key: the key that clients must send; None for no key.
    """

    def __init__(self, app: Any, engine: Engine, api_key: str | None) -> None:
        self._app, self._metrics = app, engine.metrics
        self._wanted = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.startswith("/v1/"):
            await self._app(scope, receive, send)
            return

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path if path in _COUNTED else "other", message["status"])
            await send(message)

        if self._wanted is not None and not self._knows(dict(scope["headers"]).get(b"authorization", b"")):
            await JSONResponse({"error": "Unauthorized"}, 401)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _knows(self, given: bytes) -> bool:
        # In constant time, so that the time does not reveal how many bytes are right.
        return self._wanted is not None and hmac.compare_digest(given, self._wanted)


_COUNTED = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/weft")


def _closing(engine: Engine) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    return lifespan


async def _as_openai(request: Request, err: Exception) -> Response:
    """Errors of the routing, in OpenAI's format."""
    assert isinstance(err, HTTPException)
    told = RequestError(f"{request.method} {request.url.path}: {err.detail}", None, err.status_code)
    return JSONResponse(told.body(), told.status, headers=err.headers)


async def _body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        RequestError: the content type is not JSON, or the body is too large.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # browsers send other types for any page, without a CORS preflight
        raise RequestError(f"content-type ({shown(kind)}) must be application/json", "content-type", 415)
    too_large = RequestError(f"the body has more than {_MOST_BYTES:,} bytes", "body", 413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > _MOST_BYTES:
        raise too_large
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MOST_BYTES:
            raise too_large
    return bytes(data)


def _read(raw: bytes, reads: Reads, *, chat: bool) -> Wanted:
    """Parse, read and check a body.

    Raises:
        RequestError: it is not valid JSON, or a field is not valid.
    """
    try:
        body = parse_json(raw.decode())
    except ValueError as err:
        raise RequestError(f"the body is no valid JSON ({err})", "body") from err
    return read_body(body, reads, chat=chat)


def _into(delivered: asyncio.Queue[Delivered]) -> Any:
    """A function with which the engine's thread puts something into the queue."""
    loop = asyncio.get_running_loop()

    def deliver(one: Delivered) -> None:
        with suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(delivered.put_nowait, one)

    return deliver


async def _unless_gone(request: Request, awaited: Any) -> Any:
    """Await something, or raise if the client disconnects first.

    Raises:
        ClientGone: the client has disconnected.
    """
    work = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientGone
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _all(first: Piece | None, delivered: asyncio.Queue[Delivered]) -> list[Piece]:
    """Wait for all pieces."""
    found: list[Piece] = []
    one = first
    while one is not None:
        found.append(one)
        one = _piece(await delivered.get())
    return found


async def _parts(first: Piece | None, delivered: asyncio.Queue[Delivered], answers: Answers) -> AsyncIterator[str]:
    """The events of a stream."""
    one = first
    try:
        while one is not None:
            yield answers.part(one)
            one = _piece(await delivered.get())
    except Exception as err:  # the stream has begun, so the error becomes an event
        yield error_event(err)
        return
    yield answers.ending()


def _piece(one: Delivered) -> Piece | None:
    """The piece that was delivered, or None at the end; a delivered error is raised."""
    if isinstance(one, BaseException):
        raise one
    return one

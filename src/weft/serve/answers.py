"""Changes vLLM's answers before they are sent: inserts the requested model name and the shares of each token."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import Message, Send

Ask = Callable[..., Awaitable[list[Any]]]

_EVENT = b"data: "


class Rewritten:
    """An ASGI `send` that collects the whole body, changes it and then sends it.

    Args:
        send: sends to the client.
        rewrite: changes the body of an answer with status 200.
    """

    def __init__(self, send: Send, rewrite: Callable[[bytes], Awaitable[bytes]]) -> None:
        self.send = send
        self.rewrite = rewrite
        self._start: Message = {}
        self._parts: list[bytes] = []

    async def __call__(self, message: Message) -> None:
        """Collect a message of the server; send the answer when it is complete."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        self._parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            body = b"".join(self._parts)
            if self._start["status"] == 200:
                body = await self.rewrite(body)
            headers = [each for each in self._start["headers"] if each[0] != b"content-length"]
            await self.send({**self._start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            await self.send({"type": "http.response.body", "body": body})


class Shares:
    """The shares of one text, which are fetched from vLLM's workers.

    Args:
        ask_workers: calls a method in all workers.
        experts: the experts' names, in order.
        name: the key of the text in the workers.
        tokens_too: whether the client has requested token ids. vLLM always returns them here, as they are counted.
    """

    def __init__(self, ask_workers: Ask, experts: tuple[str, ...], name: str, *, tokens_too: bool) -> None:
        self.ask_workers = ask_workers
        self.experts = experts
        self.name = name
        self.tokens_too = tokens_too
        self._sent = 0
        self._found: dict[int, list[float]] = {}

    async def put_into(self, choice: dict[str, Any]) -> None:
        """Add the shares of its tokens to a choice of an answer or of a stream event."""
        tokens = choice.get("token_ids") or []
        if not self.tokens_too:
            choice.pop("token_ids", None)
            choice.pop("prompt_token_ids", None)
        wanted = range(self._sent, self._sent + len(tokens))
        self._sent = wanted.stop
        if any(number not in self._found for number in wanted):
            for of_engine in await self.ask_workers("weft_shares", self.name, False):
                self._found.update(of_engine)
        rows = [self._found.pop(number, None) for number in wanted]
        choice["weft"] = {"shares": [row and dict(zip(self.experts, row, strict=True)) for row in rows]}

    async def forget(self) -> None:
        """Remove this text's shares from the workers."""
        await self.ask_workers("weft_shares", self.name, True)


class Answer:
    """The changes of one answer.

    Args:
        model: the model name in the request.
        shares: the shares of its text; None if they were not requested.
    """

    def __init__(self, model: str, shares: Shares | None) -> None:
        self.model = model
        self.shares = shares

    def sent_by(self, send: Send) -> Send:
        """A `send` that changes the answer: event by event for a stream, else the whole body."""
        whole = Rewritten(send, self._whole)
        held = bytearray()
        streams = False

        async def changed(message: Message) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                streams = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
                await (send if streams else whole)(message)
            elif not streams:
                await whole(message)
            else:
                held.extend(message.get("body", b""))
                more = message.get("more_body", False)
                body = await self._events(held, last=not more)
                if body or not more:
                    await send({"type": "http.response.body", "body": body, "more_body": more})

        return changed

    async def _events(self, held: bytearray, *, last: bool) -> bytes:
        """Take the complete events out of the buffer `held`, and return them changed."""
        found = bytearray()
        while (end := held.find(b"\n\n")) >= 0:
            event = bytes(held[: end + 2])
            del held[: end + 2]
            # An event may have a line with its type before the data.
            before, mark, data = event.rpartition(_EVENT) if not event.startswith(_EVENT) else (b"", _EVENT, event[6:])
            if mark and data.strip().startswith(b"{"):
                data = await self._whole(data) + b"\n\n"
            found += before + mark + data
        if last:
            found += held
            held.clear()
        return bytes(found)

    async def _whole(self, raw: bytes) -> bytes:
        body = json.loads(raw)
        for part in (body, body.get("response"), body.get("message")):  # completions; responses; messages
            if isinstance(part, dict) and "model" in part:
                part["model"] = self.model
        if self.shares is not None:
            if not self.shares.tokens_too:
                body.pop("prompt_token_ids", None)
            for choice in body.get("choices") or []:
                await self.shares.put_into(choice)
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()

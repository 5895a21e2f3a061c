"""A server over real sockets that answers as a test has scripted it: what the page at / of `weft serve` talks to."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from weft.serve.page import page

CUT = object()  # in a stream: the connection ends here, in the middle of the answer
PATIENCE = 20  # seconds


@dataclass
class Reply:
    """An answer that is no stream."""

    status: int
    body: str
    kind: str = "application/json"


def refusal(status, message):
    """As both engines put it."""
    return Reply(status, json.dumps({"error": {"message": message, "type": "BadRequestError", "code": status}}))


def event(text, *shares, finish=None, chat=False, end="\n"):
    """A streamed chunk: its text, and a dict of shares for each of its tokens."""
    said = {"delta": {"content": text}} if chat else {"text": text}
    told = {"weft": {"shares": list(shares)}} if shares else {}
    choice = {"index": 0, **said, "finish_reason": finish, **told}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}{end}{end}".encode()


DONE = b"data: [DONE]\n\n"


@dataclass
class Scripted:
    """What a server answers, and what it was asked.

    Attributes:
        info: of /v1/weft.
        answers: of the completions, in order: a Reply, or the parts of a stream: bytes, seconds to wait, an event to
            wait for, CUT.
        key: without it all paths under /v1 are 401.
        asked: path and body of each completion.
        hung_up: set when a client left a stream before its end.
    """

    info: dict
    answers: list = field(default_factory=list)
    key: str | None = None
    asked: list = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    url: str = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path == "/":
            self._reply(Reply(200, page(), "text/html; charset=utf-8"))
        elif self._welcome():
            self._reply(
                self.scripted.info
                if isinstance(self.scripted.info, Reply)
                else Reply(200, json.dumps(self.scripted.info))
            )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._welcome():
            return
        self.scripted.asked.append((self.path, body))
        answer = self.scripted.answers.pop(0)
        if isinstance(answer, Reply):
            self._reply(answer)
        else:
            self._stream(answer)

    @property
    def scripted(self):
        return self.server.scripted

    def _welcome(self):
        welcome = self.scripted.key is None or self.headers["Authorization"] == f"Bearer {self.scripted.key}"
        if not welcome:
            self._reply(Reply(401, '{"error": "Unauthorized"}'))
        return welcome

    def _reply(self, reply):
        body = reply.body.encode()
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, parts):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in parts:
                if part is CUT:
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if isinstance(part, bytes):
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                else:
                    self._wait(part)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True
            self.scripted.hung_up.set()

    def _wait(self, part):
        end = time.monotonic() + (part if isinstance(part, int | float) else PATIENCE)
        while time.monotonic() < end and not (isinstance(part, threading.Event) and part.is_set()):
            if select.select([self.connection], [], [], 0.002)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError


@contextmanager
def serving(scripted):
    """Serve it, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.scripted = scripted
    scripted.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""A proxy before the tests' object store that harms the answers to GET, as told."""

from __future__ import annotations

import http.client
import socket
import struct
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import urlsplit

import pytest

SAID = {"500": b"InternalError", "503": b"SlowDown", "403": b"AccessDenied"}
ONCE_MORE = ("500", "503", "reset", "truncated", "silent")  # what passes


class Flaky(ThreadingHTTPServer):
    """`harm` [kinds]: what befalls the next answers, one each; `always`: what befalls all after them. `asked`: (method, name) of every request."""

    daemon_threads = True

    def __init__(self, store: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.store, self.url = urlsplit(store).netloc, f"http://127.0.0.1:{self.server_port}"
        self.harm: list[str] = []
        self.always: str | None = None
        self.asked: list[tuple[str, str]] = []
        self.over = Event()

    def handle_error(self, request, client_address):
        """A client that gave up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Flaky

    def _pass(self):
        self.server.asked.append((self.command, urlsplit(self.path).path.rpartition("/")[2]))
        get = self.command == "GET"
        harm = (self.server.harm.pop(0) if self.server.harm else self.server.always) if get else None
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if harm == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif harm in SAID:
            self._answer(int(harm), {}, b"<Error><Code>%s</Code><Message>as asked for</Message></Error>" % SAID[harm])
        else:
            store = http.client.HTTPConnection(self.server.store)
            store.request(self.command, self.path, sent, dict(self.headers))
            answer = store.getresponse()
            self._answer(answer.status, dict(answer.getheaders()), answer.read(), harm)

    def _answer(self, status: int, headers: dict[str, str], body: bytes, harm: str | None = None):
        self.send_response_only(status)
        told = headers if self.command == "HEAD" else headers | {"Content-Length": str(len(body))}
        for name, value in told.items():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        if harm == "damaged":
            body = body[: len(body) // 2] + b"?" + body[len(body) // 2 + 1 :]
        self.wfile.write(body[: len(body) // 2] if harm in ("truncated", "silent") else body)
        if harm in ("truncated", "silent"):
            self.wfile.flush()
            self.server.over.wait(60 if harm == "silent" else 0)
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = _pass

    def log_message(self, *_):
        """The tests' output is theirs."""


@pytest.fixture
def flaky(s3, monkeypatch, tmp_path) -> Iterator[Flaky]:
    """Between this test and the store, with a cache of the test's own."""
    server = Flaky(s3["AWS_ENDPOINT_URL"])
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VHS_REQUEST_S", "1")
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()

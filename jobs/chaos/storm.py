"""Several workers on one run, harm done to them by a seeded schedule until the run is complete, and the comparison with a run that nothing disturbed."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from jobs.audit import verify_all
from jobs.chaos import observer, payload, proxy
from shards.crash import HARMS, WINDOWS
from shards.storage import OBJECTS, open_storage

WORKERS = 3
STANDS_STILL_S = 3.0  # a worker that was stopped: longer than it takes the others to overtake it
PATIENCE_S = 600
ASIDE = ("state/", "checkpoints/")
LATEST = {  # of the passages of a window in one worker's life, the last that harm may wait for
    "claim": 5, "write-begun": 25, "name-made": 15, "tar-half-written": 3, "tar-before-sidecar": 3, "sidecar-written-not-linked": 3, "files-before-marker": 2,
    "checkpoint-half-written": 3, "training-step": 9, "round-before-commit": 1, "table-written-not-linked": 4, "report-half-written": 1,
    "plan-before-commit": 1, "claim-not-dropped": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of one run. `fired`: (window or request, harm) -> times. `twice`: names that two calls made; `torn`: what a reader saw meanwhile; `lost`,
    `strange` and `different`: names against those of the undisturbed run; `errors`: what verify finds."""

    out: str
    fired: Counter
    workers: int
    looks: int
    compared: int
    twice: list[str]
    torn: list[str]
    lost: list[str]
    strange: list[str]
    different: list[str]
    errors: list[str]

    @property
    def wrong(self) -> list[str]:
        """Everything that must not be, a line each."""
        kinds = ("twice", "torn", "lost", "strange", "different", "errors")
        return [f"{self.out}: {kind}: {what}" for kind in kinds for what in getattr(self, kind)]


@dataclass
class Schedule:
    """Which worker meets which harm, drawn from `seed`. Windows that were met less often in `met`, which storms share, come first."""

    seed: int
    met: Counter = field(default_factory=Counter)

    def __post_init__(self):
        self._random = random.Random(self.seed)

    def next(self) -> str:
        """What VHS_CRASH_AT is for the next worker: the first window it comes to does the harm, so those met often are left out more often."""
        least = min(self.met[window] for window in WINDOWS)
        chosen = [window for window in WINDOWS if self._random.random() < (1 + least) / (1 + self.met[window])]
        return ",".join(f"{window}:{self._random.randint(1, LATEST[window])}={self._random.choice(list(HARMS))}" for window in chosen)


def schedules(seed: int) -> Iterator[Schedule]:
    """Of one run after another, from `seed` on; what one has met, the next leaves out more often."""
    met: Counter = Counter()
    return (Schedule(number, met) for number in itertools.count(seed))


def undisturbed(out: str, pipeline: bool, settings: Sequence[str] = ()) -> dict[str, str]:
    """Every committed name of such a run with its sha256; it is made at `out`."""
    with _scratch() as scratch:
        worker = _worker(out, scratch, {}, (pipeline, settings))
        worker.join()
        if worker.exitcode:
            raise RuntimeError(f"the undisturbed run failed: {(scratch / 'said').read_text()[-2000:]}")
    return committed(out)


def committed(out: str) -> dict[str, str]:
    """Every name that readers may open, with the sha256 of its bytes."""
    storage = open_storage(out)
    return {name: hashlib.sha256(storage.read(name)).hexdigest() for name in storage.list() if not name.startswith(ASIDE)}


def storm(
    out: str, schedule: Schedule, harms: int, reference: dict[str, str], *,
    pipeline: bool = False, settings: Sequence[str] = (), every: int = 40, meanwhile: Callable = lambda: None,
) -> Outcome:  # fmt: skip
    """A run at `out`, which must be new, harmed `harms` times at most until it is complete, then compared with `reference`.

    pipeline   the real stages, not those of payload.py
    settings   over those of payload.py, as the reference's were
    every      of an object store's requests one in so many meets trouble
    meanwhile  called once, when half of the harm is done
    """
    with _scratch() as scratch, _observed(out) as seen, _troubled(out, schedule.seed, every, scratch) as through:
        workers = _until_complete(out, schedule, harms, scratch, through, (pipeline, settings), meanwhile)
        fired = Counter(tuple(line.split()[:2]) for line in _lines(scratch / "harm"))
        twice = [name for name, times in Counter(_lines(scratch / "commits")).items() if times > 1 and not name.startswith(ASIDE)]
    looks, _, torn = seen[0]
    ours, (*_, findings) = committed(out), verify_all(out, full=True)
    return Outcome(
        out, fired, workers, looks, len(reference), twice, torn,
        lost=sorted(reference.keys() - ours.keys()), strange=sorted(ours.keys() - reference.keys()),
        different=sorted(name for name in reference.keys() & ours.keys() if ours[name] != reference[name]),
        errors=[f"{finding.path}: {finding.what}" for finding in findings if finding.error],
    )  # fmt: skip


def _until_complete(out, schedule: Schedule, harms: int, scratch: Path, through: dict[str, str], kind: tuple, meanwhile: Callable) -> int:
    """-> how many workers it took. A worker that ends well says that the run is complete; until then whoever dies is followed by another."""
    alive: list[BaseProcess] = []
    stopped: dict[int, float] = {}
    counted, begun, complete, deadline = 0, 0, False, time.monotonic() + PATIENCE_S
    while alive or not complete:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{out} is not complete after {PATIENCE_S} s. Its workers said: {(scratch / 'said').read_text()[-3000:]}")
        for line in (said := _lines(scratch / "harm"))[counted:]:
            where, harm, pid = line.split()
            if where in WINDOWS:
                schedule.met[where] += 1
            if harm == "stop":
                stopped[int(pid)] = time.monotonic()
        if counted < harms // 2 <= len(said):
            meanwhile()
        counted = len(said)
        for pid in [pid for pid, since in stopped.items() if time.monotonic() - since > STANDS_STILL_S]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            del stopped[pid]
        complete = complete or any(worker.exitcode == 0 for worker in alive)
        alive = [worker for worker in alive if worker.exitcode is None]
        while len(alive) < WORKERS and not complete:
            harm = {"VHS_CRASH_AT": schedule.next()} if counted < harms else {}
            alive.append(_worker(out, scratch, through | harm, kind))
            begun += 1
        time.sleep(0.05)
    return begun


def _worker(out: str, scratch: Path, environment: dict[str, str], kind: tuple) -> BaseProcess:
    logs = {"VHS_CRASH_LOG": str(scratch / "harm"), "CHAOS_COMMITS": str(scratch / "commits"), "CHAOS_SAID": str(scratch / "said")}
    return _process(payload.work, out, *kind, environment=environment | logs)


def _context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jobs.chaos.payload", "vhs.checkpoint", "vhs.radiograph", "pandas"])
    return context


def _process(target: Callable, *arguments, environment: dict[str, str] | None = None) -> BaseProcess:
    """A process in this one's environment and more, forked from one that has imported everything and done nothing: it begins in a moment."""
    process = _context().Process(target=_in, args=({**os.environ, **(environment or {})}, target, arguments), daemon=True)
    process.start()
    return process


def _in(environment: dict[str, str], target: Callable, arguments: tuple):
    os.environ.clear()  # what the one it was forked from had
    os.environ.update(environment)
    target(*arguments)


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="vhs-chaos-"))
    yield folder  # what went wrong is left to be looked at
    shutil.rmtree(folder)


@contextmanager
def _observed(out: str) -> Iterator[list]:
    """Somebody reads the run all the while; on leaving the list holds their word."""
    over, (ours, theirs), seen = _context().Event(), _context().Pipe(), []
    reader = _process(observer.watch, out, over, theirs)
    theirs.close()  # then its death is the end of the pipe
    try:
        yield seen
        over.set()
        if not ours.poll(PATIENCE_S):
            raise RuntimeError(f"the reader of {out} did not come to an end")
        seen.append(ours.recv())
    finally:
        reader.kill()


@contextmanager
def _troubled(out: str, seed: int, every: int, scratch: Path) -> Iterator[dict[str, str]]:
    """What workers need in their environment to meet trouble on the way to the object store of `out`; on a disk nothing."""
    if not out.startswith(tuple(f"{scheme}://" for scheme in OBJECTS)):
        yield {}
        return
    ours, theirs = _context().Pipe()
    log = {"VHS_CRASH_LOG": str(scratch / "harm")}
    server = _process(proxy.serve, theirs, os.environ["AWS_ENDPOINT_URL"], seed, every, 2 * payload.REQUEST_S, environment=log)
    try:
        yield {"AWS_ENDPOINT_URL": ours.recv(), "VHS_REQUEST_S": str(payload.REQUEST_S)}
    finally:
        server.kill()


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []

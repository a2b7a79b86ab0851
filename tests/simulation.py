"""A cluster that is not there: the project's own scheduling on a clock of its own, a thousand workers in one thread.

What is real: jobs.plan, rounds, chain.links, share, drive, dispatch, attempt, claim, failures, unit. What is not: the clock, the storage medium (names and
bytes in a dictionary, of which each operation takes a moment in which others act), the processes and nodes, and what a unit works at.
"""

from __future__ import annotations

import math
import random
import tempfile
from bisect import bisect_left, insort
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
from virtual_time import Clock, Process

from jobs import attempt, chain, claim, failures, plan, share
from jobs.config import load
from jobs.drive import frontier
from jobs.interrupt import Interrupted
from jobs.stages import STAGES
from jobs.unit import Files, Table
from vhs.measure import CLASSES

URL = "simulated"


@dataclass
class Faults:
    """What goes wrong. Of a worker's hour: losses of its node, preemptions, stalls (it stands still longer than a claim is believed to live, and then goes
    on). Of attempts: those that raise; those that take `slow` times as long."""

    losses: float = 0.0
    preemptions: float = 0.0
    stalls: float = 0.0
    errors: float = 0.0
    stragglers: float = 0.0
    slow: float = 5.0


class Medium:
    """What shards.storage.Storage promises, of names in memory. Every operation takes a moment in which others may act, or in which its process ends."""

    def __init__(self, clock: Clock, root: Path):
        self.url, self.work, self._clock, self._files, self._names = f"memory://{root}", root, clock, {}, []
        self.operations: Counter[str] = Counter()
        self.committed: Counter[str] = Counter()  # how often a commit of this name said that it had made it

    def _moment(self, what: str):
        self.operations[what] += 1
        self._clock.sleep(self._clock.dice.uniform(0.0005, 0.004))

    def commit(self, path: str, data, *, crash_window: str | None = None, durable: bool = True) -> bool:
        data = data.read_bytes() if isinstance(data, Path) else data
        self._moment("commit")
        won = path not in self._files
        if won:
            self._write(path, data)
            self.committed[path] += 1
        self._moment("answer")
        return won

    def put(self, path: str, data: bytes, *, durable: bool = True):
        self._moment("put")
        self._write(path, data)

    def _write(self, path: str, data: bytes):
        if path not in self._files:
            insort(self._names, path)
        self._files[path] = data

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        self._moment("read")
        if path not in self._files:
            raise FileNotFoundError(path)
        return self._files[path][offset : None if length is None else offset + length]

    def size(self, path: str) -> int:
        return len(self.read(path))

    def exists(self, path: str) -> bool:
        self._moment("exists")
        return path in self._files

    def list(self, prefix: str = "") -> list[str]:
        self._moment("list")
        return self._names[bisect_left(self._names, prefix) : bisect_left(self._names, prefix + plan.LAST)]

    def delete(self, path: str):
        self._moment("delete")
        if self._files.pop(path, None) is not None:
            del self._names[bisect_left(self._names, path)]

    def sweep(self, older_than_s: float) -> int:
        return 0

    def local(self, path: str) -> Path:
        raise AssertionError(f"{path}: no file of this machine")


class _Meter:
    clock: Clock

    def __init__(self):
        self._began_s = self.clock.now_s

    def read(self, ranks: int = 1) -> dict[str, float]:
        return {"seconds": self.clock.now_s - self._began_s, "core_seconds": self.clock.now_s - self._began_s, "peak_gb": 1.0}


class _Seen:
    """A dictionary for each process: what one has seen of a heartbeat no other knows."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def __getattr__(self, name: str):
        return getattr(self._clock.process().seen, name)

    def __setitem__(self, key, value):
        self._clock.process().seen[key] = value


class _Hearts:
    """A heart for each process."""

    def __init__(self, clock: Clock):
        self._clock = clock

    def __getattr__(self, name: str):
        process = self._clock.process()
        process.heart = process.heart or claim._Heart()
        return getattr(process.heart, name)


class Simulation:
    """One run on `workers` workers, four a node, through as many submissions as it takes."""

    SECONDS = {
        "ingest": 20, "split": 10, "labeller": 200, "priors": 60, "dreambooth": 300, "prompts": 30, "generate": 300, "label": 30, "train": 400,
        "evaluate": 30, "report": 30,
    }  # fmt: skip

    def __init__(self, workers: int, faults: Faults, seed: int, overrides: list[str], units_per_job: dict[str, int] | None = None):
        self.dice, self.workers, self.faults, self._per_job = random.Random(seed), workers, faults, units_per_job or {}
        self.clock = Clock(self.dice)
        self.config = load("debug/demo", ["execution.heartbeat_s=10", "execution.stale_s=60", *overrides])
        self.started: Counter[str] = Counter()  # unit -> attempts that began its work
        self.hits: Counter[str] = Counter()  # fault -> times it met a worker at work on a unit
        self.processes: list[Process] = []
        self.submissions, self.failed, self._left, self._links = 0, 0, 0, []
        self._kept: tuple[dict, dict, dict, dict] = {}, {}, {}, {}

    def run(self) -> Simulation:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
            self.medium = Medium(self.clock, Path(folder))
            for one in self._patches():
                patches.enter_context(one)
            self._submit()
            self.clock.run()
            self.clock.over = True  # what was killed runs to its end now, and changes nothing
            self.view = self._open()
            for process in self.processes:
                process.threads.clear()
        return self

    def _patches(self):
        clock, medium = self.clock, self.medium
        _Meter.clock = clock
        for module in (claim, share, failures, attempt):
            yield patch.object(module, "time", clock)
        yield patch.object(claim, "threading", clock)
        yield patch.object(claim, "_seen", _Seen(clock))
        yield patch.object(claim, "_heart", _Hearts(clock))
        yield patch.object(failures, "owner", self._owner)
        for module in (claim, attempt):
            yield patch.object(module, "machine", lambda: f"node{clock.process().node}")
            yield patch.object(module, "owner", self._owner)
            yield patch.object(module, "dead", self._dead)
        yield patch.object(attempt, "Meter", _Meter)
        for module in (plan, attempt):
            yield patch.object(module, "open_storage", lambda url: medium)
        for stage in STAGES:
            yield patch.object(stage, "work", partial(self._work, stage.NAME))
            yield patch.object(stage, "TORCH", False)

    def _owner(self) -> dict:
        process = self.clock.process()
        return {"machine": f"node{process.node}", "pid": process.number, "started": "0", "node": f"node{process.node}", "job": "", "run": 0}

    def _dead(self, other: dict) -> bool:
        mine = other["machine"] == f"node{self.clock.process().node}"
        return mine and not self.processes[other["pid"]].alive

    def _open(self) -> plan.Run:
        """What a process reads and names is the same for all: they share the memory of it, so that a minute is enough."""
        run = plan.Run(URL, self.config)
        run._markers, run._sha256, run._made, run._at_work = self._kept
        run.refresh()
        return run

    # --- the cluster
    def _submit(self):
        self.submissions += 1
        assert self.submissions <= 10, "the same command again and again, and no end"

        def submit():
            run = self._open()
            for _, units in run.named():
                for unit in units:
                    failures.forget(run.storage, unit.identity)
            self._links = chain.links(run)
            self._next_link()

        self._process(submit)

    def _next_link(self):
        if not self._links:
            if frontier(self._open()):
                return self._submit()
            self.ended_s = self.clock.now_s
            return
        link = self._links.pop(0)
        count = min(self.workers, max(1, math.ceil(link.units / self._per_job.get(link.stage, 1))))
        self._left = count
        for index in range(count):
            self._queue(link, index, count, 0.0)

    def _queue(self, link: share.Link, index: int, count: int, after_s: float):
        self.clock.at(self.clock.now_s + after_s, lambda: self._process(partial(self._job, link, index, count), (link, index, count)))

    def _process(self, work, job=None):
        number = len(self.processes)
        process = Process(self.dice.randrange(max(1, self.workers // 4)), number, job=job)
        self.processes.append(process)
        self.clock.spawn(process, work)
        if job:
            for rate, fault in ((self.faults.losses, self._lose), (self.faults.preemptions, self._preempt), (self.faults.stalls, self._stall)):
                if rate:
                    self.clock.at(self.clock.now_s + self.dice.expovariate(rate / 3600), partial(fault, process))

    def _job(self, link, index, count):
        try:
            self.clock.sleep(self.dice.uniform(5, 20))
            share.work(self._open(), link, index, count)
        except share.Failed:
            self.failed += 1
        except Interrupted:
            return self._again(self.clock.process())
        self.clock.process().alive = False
        self._left -= 1
        if not self._left:
            self._process(self._next_link)

    def _again(self, process: Process):
        process.alive = False
        self._queue(*process.job, self.dice.uniform(10, 60))

    def _hit(self, fault: str, process: Process):
        if process.at_work:
            self.hits[fault] += 1

    def _lose(self, process: Process):
        """The node of `process`, with all that runs there."""
        if process.alive:
            for other in self.processes:
                if other.alive and other.job and other.node == process.node:
                    self._hit("node lost", other)
                    self._again(other)

    def _preempt(self, process: Process):
        if process.alive:
            self._hit("preempted", process)
            self.clock.interrupt(process, Interrupted("USR2"))

    def _stall(self, process: Process):
        if process.alive:
            self._hit("stood still", process)
            process.still_until_s = self.clock.now_s + 3 * self.config.execution.stale_s

    # --- the work
    def _work(self, stage: str, config, inputs, output):
        unit, process = inputs._unit, self.clock.process()
        self.started[unit.path] += 1
        process.at_work = unit.path
        try:
            seconds = self.SECONDS[stage] * self.dice.uniform(0.9, 1.1)
            if self.dice.random() < self.faults.stragglers:
                seconds *= self.faults.slow
            if self.dice.random() < self.faults.errors:
                self.clock.sleep(seconds * self.dice.random())
                self.hits["raised"] += 1
                raise RuntimeError("planted")
            self.clock.sleep(seconds)
        finally:
            process.at_work = ""
        images = config.generation.unit_images
        accepted = {name: round(0.7 * images) if name == unit.params.get("class") else 0 for name in CLASSES}
        facts = {"images": images, "accepted": accepted, "rejects": [], "sources": ["clinic"]}
        return Files(facts) if unit.kind == "json" else Table(pa.table({"key": [unit.path]}), facts)

    # --- what became of it
    def units(self) -> list:
        return [unit for _, units in self.view.named() for unit in units]

    @property
    def redone(self) -> int:
        """Attempts at work beyond the first of each unit."""
        return sum(count - 1 for count in self.started.values())

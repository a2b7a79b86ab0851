"""Who is working on a unit, and how the attempts before ended. Claims save work; the commit (jobs/unit.py) keeps it correct.

A claim is state/claims/<unit identity>-<attempt number>.json, created if absent, so one worker gets each number. It is alive while its heartbeat
file changes. A claim of a dead process on this machine, or one whose heartbeat was seen standing still for `stale_s` by this process's own
clock, is overtaken by taking the next number; the overtaken attempt notices at its next heartbeat and stops. An attempt that ends writes how into its
claim, which then holds nobody up; one that was killed cannot, and that its claim lacks the word is what tells. A unit's only attempt, when it
succeeds, leaves no claim: what stays is the record of work begun again.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from shards import crash
from shards.credentials import without_keys
from shards.storage import Storage

_seen: dict[str, tuple[bytes, float]] = {}  # claim -> (heartbeat, when this process first saw it): staleness by observed change
FOLDER = "state/claims/"


class Superseded(Exception):
    """Another attempt has taken this unit over; this one must stop. Nothing is lost: the product is committed by whoever finishes."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at a unit, as its claim tells it. `job`: SLURM's, or ""; `run` of it counts its requeues. `how`: done | failed | interrupted | superseded,
    or "" while it lasts and where it was killed, until somebody who learns of that writes killed; `cause`: their word. Times in seconds since the epoch."""

    identity: str
    number: int
    machine: str
    pid: int
    started: str
    node: str = ""
    job: str = ""
    run: int = 0
    began_s: float = 0.0
    ended_s: float = 0.0
    how: str = ""
    cause: str = ""


def _started(pid: int) -> str:
    """When process `pid` started (clock ticks since boot), or "" where it is gone; tells a process from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@cache
def machine() -> str:
    """A name for where process numbers mean something: this host since it booted, and this container of it."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return "-".join(
        [socket.gethostname(), boot.read_text()[:8] if boot.exists() else "", os.readlink(space)[5:-1] if space.exists() else ""]
    )


def owner() -> dict:
    """Who this process is, for others to see whether it still lives and where it ran."""
    return {**_process(os.getpid()), "job": _job(), "run": int(os.environ.get("SLURM_RESTART_COUNT", 0))}


@cache
def _process(pid: int) -> dict:
    return {"machine": machine(), "pid": pid, "started": _started(pid), "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname()}


def _job() -> str:
    """The job this process belongs to, as its scheduler names it, or ""."""
    get = os.environ.get
    if get("SLURM_ARRAY_JOB_ID"):
        return f"{get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}"
    return get("SLURM_JOB_ID", "")


def dead(other: dict) -> bool:
    """Whether `other` (an `owner`) ran on this machine and is gone. Of other machines nothing is known."""
    return other["machine"] == machine() and _started(other["pid"]) != other["started"]


def read(storage: Storage, name: str) -> Attempt | None:
    """The attempt whose claim is called `name`; None where there is none."""
    try:
        content = json.loads(storage.read(name))
    except FileNotFoundError:
        return None
    except ValueError:  # a power cut took its bytes: an attempt of nobody, which grows stale
        content = {"machine": "", "pid": 0, "started": ""}
    identity, _, number = Path(name).stem.rpartition("-")
    return Attempt(identity, int(number), **content)


def attempts(storage: Storage, identity: str) -> list[Attempt]:
    """Those at one unit that have a claim, in order: numbers are opened upward, no listing."""
    found: list[Attempt] = []
    while one := read(storage, _name(identity, len(found))):
        found.append(one)
    return found


def close(storage: Storage, killed: Attempt, cause: str):
    """Write into the claim of an attempt that was killed what its worker could not. From then on it holds nobody up."""
    word = {**vars(killed), "ended_s": time.time(), "how": "killed", "cause": without_keys(cause)}
    storage.put(_name(word.pop("identity"), word.pop("number")), json.dumps(word).encode(), durable=False)


def held(storage: Storage, last: Attempt, stale_s: float) -> bool:
    """Whether the last attempt at a unit is still at work, as far as this process can tell: to see a heart stand still it has to look twice, `stale_s`
    apart."""
    if last.how or dead(vars(last)):
        return False
    name = beat_name(last.identity, last.number)
    try:
        beat = storage.read(name)
    except FileNotFoundError:
        beat = b""
    before, since = _seen.setdefault(name, (beat, time.monotonic()))
    if beat != before:
        _seen[name] = (beat, time.monotonic())
        return True
    return time.monotonic() - since <= stale_s


def overtaken(storage: Storage, identity: str, number: int) -> bool:
    """Whether a later attempt has claimed the unit."""
    return storage.exists(_name(identity, number + 1))


def _name(identity: str, number: int, suffix: str = "json") -> str:
    return f"{FOLDER}{identity}-{number:04d}.{suffix}"


def beat_name(identity: str, number: int) -> str:
    """Where an attempt says that it lives, and how far it is."""
    return _name(identity, number, "beat")


class _Heart:
    """One thread that beats for all claims of this process, while there are any: one for each would cost more than all else that a short unit needs."""

    def __init__(self):
        self._claims: set[Claim] = set()
        self._lock, self._thread, self._period_s, self._sooner = threading.Lock(), None, float("inf"), threading.Event()

    def add(self, claim: Claim):
        with self._lock:
            self._claims.add(claim)
            if claim.heartbeat_s < self._period_s:
                self._period_s = claim.heartbeat_s
                self._sooner.set()
            if not self._thread:
                self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
                self._thread.start()

    def drop(self, claim: Claim):
        with self._lock:
            self._claims.discard(claim)

    def _run(self):
        while True:
            if self._sooner.wait(self._period_s):
                self._sooner = threading.Event()
                continue
            with self._lock:
                claims = list(self._claims)
                if not claims:
                    self._thread = None
                    return
            for claim in claims:
                claim.beat()


_heart = _Heart()


def keep_beating(one):
    """From now on `one.beat()` is called every `one.heartbeat_s` seconds, in this process's one thread for that."""
    _heart.add(one)


def stop_beating(one):
    _heart.drop(one)


def _new_heart():
    """A forked child has neither its parent's threads nor its claims."""
    global _heart
    _heart = _Heart()


os.register_at_fork(after_in_child=_new_heart)


class Claim:
    """This process's claim on one unit. Use as a context manager: the heart beats inside, and at the end the claim says how it went."""

    def __init__(self, storage: Storage, identity: str, attempt: int, heartbeat_s: float, beating: bool = True, before: tuple[Attempt, ...] = ()):
        """`beating` False: the claim of another process, only looked at from here. `before`: the attempts that came before this one."""
        self.storage, self.identity, self.attempt, self.before = storage, identity, attempt, before
        self._beating, self._looked_s, self._began_s = beating, time.monotonic(), time.time()
        self.message: dict = {}
        self.heartbeat_s, self.superseded, self._beats, self._over, self._lock = heartbeat_s, False, 0, False, threading.Lock()

    @classmethod
    def take(cls, storage: Storage, identity: str, *, heartbeat_s: float, stale_s: float) -> Claim | None:
        """The unit is ours (a claim), or somebody is at work on it (None)."""
        before = attempts(storage, identity)
        if before and held(storage, before[-1], stale_s):
            return None
        claim = cls(storage, identity, len(before), heartbeat_s, before=tuple(before))
        if not storage.commit(_name(identity, claim.attempt), claim._word(), durable=False):
            return None
        crash.window("claim")
        return claim

    def _word(self, **end) -> bytes:
        return json.dumps({**owner(), "began_s": self._began_s, **end}).encode()

    def __enter__(self) -> Claim:
        keep_beating(self)
        return self

    def __exit__(self, kind, error, *_):
        how = "superseded" if self.superseded else "done" if kind is None else "failed" if issubclass(kind, Exception) else "interrupted"
        # one that overtakes us at this instant takes number 1, and 0 is free again: at worst the unit is done twice and committed once
        first = how == "done" and not self.attempt and not overtaken(self.storage, self.identity, 0)
        cause = "" if kind is None else without_keys(f"{kind.__name__}: {error}")
        self._end(None if first else self._word(ended_s=time.time(), how=how, cause=cause))

    def withdraw(self):
        """No attempt is made after all: the claim goes without a trace."""
        self._end(None)

    def _end(self, word: bytes | None):
        stop_beating(self)
        with self._lock:  # no beat after this
            if self._over:
                return
            self._over = True
        crash.window("claim-not-dropped")
        if word is None:
            self.storage.delete(_name(self.identity, self.attempt))
        else:
            self.storage.put(_name(self.identity, self.attempt), word, durable=False)
        if self._beats:
            self.storage.delete(beat_name(self.identity, self.attempt))

    def check(self):
        """Superseded, if another attempt has taken over."""
        if not self._beating and time.monotonic() - self._looked_s > self.heartbeat_s:
            self.superseded, self._looked_s = overtaken(self.storage, self.identity, self.attempt), time.monotonic()
        if self.superseded:
            raise Superseded(f"unit {self.identity}: attempt {self.attempt} was taken over")

    def beat(self):
        """Say that this attempt lives, unless another has taken over. The claim itself was the first sign of life."""
        with self._lock, suppress(OSError):  # a full disk, a file server that hiccups: the work meets it too, and says so
            self.superseded = self.superseded or overtaken(self.storage, self.identity, self.attempt)
            if not self._over and not self.superseded:
                self._beats += 1
                word = {"count": self._beats, "when_s": time.time(), **self.message}
                self.storage.put(beat_name(self.identity, self.attempt), json.dumps(word).encode(), durable=False)

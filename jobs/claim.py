"""Who is working on a unit. Claims save work; the commit (jobs/unit.py) keeps it correct.

A claim is state/claims/<unit identity>/<attempt number>.json, created if absent, so one worker gets each number. It is alive while its heartbeat
file changes. A claim of a dead process on this machine, or one whose heartbeat was seen standing still for `stale_s` by this process's own
clock, is overtaken by taking the next number; the overtaken attempt notices at its next heartbeat and stops.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

from shards import crash
from shards.storage import Storage

_seen: dict[str, tuple[bytes, float]] = {}  # claim -> (heartbeat, when this process first saw it): staleness by observed change


class Superseded(Exception):
    """Another attempt has taken this unit over; this one must stop. Nothing is lost: the product is committed by whoever finishes."""


def _started(pid: int) -> str:
    """When process `pid` started (clock ticks since boot), or "" where it is gone; tells a process from a later one with the same number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def machine() -> str:
    """A name for where process numbers mean something: this host since it booted, and this container of it."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return "-".join(
        [socket.gethostname(), boot.read_text()[:8] if boot.exists() else "", os.readlink(space)[5:-1] if space.exists() else ""]
    )


def owner() -> dict:
    """Who this process is, for others to see whether it still lives."""
    return {"machine": machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def dead(other: dict) -> bool:
    """Whether `other` (an `owner`) ran on this machine and is gone. Of other machines nothing is known."""
    return other["machine"] == machine() and _started(other["pid"]) != other["started"]


def overtaken(storage: Storage, identity: str, attempt: int) -> bool:
    """Whether a later attempt has claimed the unit."""
    return storage.exists(f"state/claims/{identity}/{attempt + 1:04d}.json")


class Claim:
    """This process's claim on one unit. Use as a context manager: the heartbeat runs inside, and the claim is dropped at the end."""

    def __init__(self, storage: Storage, identity: str, attempt: int, heartbeat_s: float, beating: bool = True):
        """`beating` False: the claim of another process, only looked at from here."""
        self.storage, self.identity, self.attempt, self._beating, self._looked_s = storage, identity, attempt, beating, time.monotonic()
        self.message: dict = {}
        self._heartbeat_s, self._stop, self.superseded = heartbeat_s, threading.Event(), False

    @classmethod
    def take(cls, storage: Storage, identity: str, *, heartbeat_s: float, stale_s: float) -> Claim | None:
        """The unit is ours (a claim), or somebody is at work on it (None)."""
        folder = f"state/claims/{identity}/"
        numbers = sorted(int(Path(name).stem) for name in storage.list(folder) if name.endswith(".json"))
        if numbers and not cls._overtakable(storage, f"{folder}{numbers[-1]:04d}", stale_s):
            return None
        attempt = numbers[-1] + 1 if numbers else 0
        won = storage.commit(f"{folder}{attempt:04d}.json", json.dumps(owner()).encode())
        crash.window("claim")
        return cls(storage, identity, attempt, heartbeat_s) if won else None

    @staticmethod
    def _overtakable(storage: Storage, name: str, stale_s: float) -> bool:
        try:
            other = json.loads(storage.read(f"{name}.json"))
        except FileNotFoundError:
            return True  # dropped between our listing and our reading
        if dead(other):
            return True
        beat = storage.read(f"{name}.beat") if storage.exists(f"{name}.beat") else b""
        last, since = _seen.setdefault(name, (beat, time.monotonic()))
        if beat != last:
            _seen[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > stale_s

    def __enter__(self) -> Claim:
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat {self.identity}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        for name in self.storage.list(f"state/claims/{self.identity}/"):
            if int(Path(name).stem) <= self.attempt:
                self.storage.delete(name)

    def check(self):
        """Superseded, if another attempt has taken over."""
        if not self._beating and time.monotonic() - self._looked_s > self._heartbeat_s:
            self.superseded, self._looked_s = overtaken(self.storage, self.identity, self.attempt), time.monotonic()
        if self.superseded:
            raise Superseded(f"unit {self.identity}: attempt {self.attempt} was taken over")

    def _beat(self):
        name, count = f"state/claims/{self.identity}/{self.attempt:04d}.beat", 0
        while True:
            self.storage.put(name, json.dumps({"count": count, **self.message}).encode())
            count += 1
            if self._stop.wait(self._heartbeat_s):
                return
            if overtaken(self.storage, self.identity, self.attempt):
                self.superseded = True
                return

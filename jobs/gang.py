"""Several machines at one unit: the first leads, the others follow.

One process a machine. The leader claims units and commits what they make; for each it says, in state/gangs/<name>/ of the run, which unit is next and
where its ranks meet. The followers start their part of the ranks, and say there what went wrong with them. Started alike by srun, submitit and Ray.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field

from jobs import claim, interrupt, world
from jobs.unit import Unit
from shards.credentials import without_keys
from shards.storage import open_storage

POLL_S, LAST_WORD_S = 0.2, 5.0
BEAT = "beat"


@dataclass(eq=False)
class Gang:
    """Machine `node` of `nodes`; a context manager for the leader. `name`: of this start of these machines and no other."""

    url: str
    name: str
    nodes: int
    node: int
    host: str = field(default_factory=socket.gethostname)  # of this machine, as the others know it
    heartbeat_s: float = 2.0
    stale_s: float = 30.0
    number: int = field(default=0, init=False)  # units begun together so far
    beats: int = field(default=0, init=False)

    def __enter__(self) -> Gang:
        """The leader's: from now on its heart beats for the followers, whatever it waits for."""
        claim.keep_beating(self)
        return self

    def __exit__(self, *_):
        """Its last word."""
        claim.stop_beating(self)
        self._say(f"{self.number:05d}.json", None)

    def beat(self):
        with suppress(OSError):  # the next one tells as much
            self.beats += 1
            self._say(BEAT, self.beats)

    def launch(self, function: Callable, url: str, unit: Unit, *arguments):
        """The leader's: `function(url, unit, *arguments)` on every rank of `unit`, spread evenly over the machines -> what rank 0 returned.
        ValueError where they cannot be, RuntimeError with the first error of every machine that had one."""
        if unit.ranks % self.nodes:
            raise ValueError(f"{unit.ranks} ranks do not spread evenly over {self.nodes} machines: change the site's ranks_per_node for {unit.stage}")
        meeting = {"host": self.host, "port": _free_port(), "unit": asdict(unit), "arguments": arguments}
        self._say(f"{self.number:05d}.json", meeting)
        try:
            return self._part(meeting, function)
        except RuntimeError as error:
            time.sleep(LAST_WORD_S)
            storage = open_storage(self.url)
            others = [storage.read(name).decode() for name in storage.list(f"state/gangs/{self.name}/{self.number:05d}-")]
            raise RuntimeError("; ".join([str(error), *others])) from error
        finally:
            self.number += 1

    def follow(self, function: Callable):
        """A follower's: take part in what the leader says, until it says the end. RuntimeError when its heart stood still for `stale_s`."""
        storage = open_storage(self.url)
        while True:
            meeting = self._hear(storage, f"{self.number:05d}.json")
            if meeting is None:
                return
            try:
                self._part(meeting, function)
            except RuntimeError as error:
                self._say(f"{self.number:05d}-{self.node}.txt", without_keys(f"{socket.gethostname()}: {error}"))
            interrupt.check()
            self.number += 1

    def _part(self, meeting: dict, function: Callable):
        unit = Unit(**meeting["unit"])
        place = world.Place(self.nodes, self.node, meeting["host"], meeting["port"])
        return world.launch(unit.ranks, function, self.url, unit, *meeting["arguments"], place=place)

    def _say(self, name: str, word):
        open_storage(self.url).put(f"state/gangs/{self.name}/{name}", (word if isinstance(word, str) else json.dumps(word)).encode())

    def _hear(self, storage, name: str):
        folder = f"state/gangs/{self.name}"
        beat, changed_s, looked_s = b"", time.monotonic(), time.monotonic()
        while not storage.exists(f"{folder}/{name}"):
            interrupt.check()
            time.sleep(POLL_S)
            if time.monotonic() - looked_s < self.heartbeat_s:
                continue
            looked_s, before = time.monotonic(), beat
            with suppress(FileNotFoundError):  # it has not begun yet
                beat = storage.read(f"{folder}/{BEAT}")
            if beat != before:
                changed_s = looked_s
            if looked_s - changed_s > (self.stale_s if beat else world.MEET_S):
                raise RuntimeError(f"the first of {self.nodes} machines, which leads, fell silent: its process was killed, or its node is lost")
        return json.loads(storage.read(f"{folder}/{name}"))


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("", 0))
        return one.getsockname()[1]

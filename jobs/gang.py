"""Several machines at one unit: the first leads, the others follow.

One process a machine. The leader claims units and commits what they make; for each it says, in state/gangs/<name>/ of the run, which unit is next and
where its ranks meet. The followers start their part of the ranks, and say there what went wrong with them. Started alike by srun, submitit and Ray.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field

from jobs import interrupt, world
from jobs.unit import Unit
from shards.storage import open_storage

POLL_S, LAST_WORD_S = 0.2, 5.0


@dataclass
class Gang:
    """Machine `node` of `nodes`. `name`: of this start of these machines and no other."""

    url: str
    name: str
    nodes: int
    node: int
    host: str = field(default_factory=socket.gethostname)  # of this machine, as the others know it
    number: int = field(default=0, init=False)  # units begun together so far

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
        """A follower's: take part in what the leader says, until it says the end."""
        storage = open_storage(self.url)
        while True:
            meeting = self._hear(storage, f"{self.number:05d}.json")
            if meeting is None:
                return
            try:
                self._part(meeting, function)
            except RuntimeError as error:
                self._say(f"{self.number:05d}-{self.node}.txt", f"{socket.gethostname()}: {error}")
            interrupt.check()
            self.number += 1

    def end(self):
        """The leader's last word."""
        self._say(f"{self.number:05d}.json", None)

    def _part(self, meeting: dict, function: Callable):
        unit = Unit(**meeting["unit"])
        place = world.Place(self.nodes, self.node, meeting["host"], meeting["port"])
        return world.launch(unit.ranks, function, self.url, unit, *meeting["arguments"], place=place)

    def _say(self, name: str, word):
        open_storage(self.url).put(f"state/gangs/{self.name}/{name}", (word if isinstance(word, str) else json.dumps(word)).encode())

    def _hear(self, storage, name: str):
        path = f"state/gangs/{self.name}/{name}"
        while not storage.exists(path):
            interrupt.check()
            time.sleep(POLL_S)
        return json.loads(storage.read(path))


def _free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("", 0))
        return one.getsockname()[1]

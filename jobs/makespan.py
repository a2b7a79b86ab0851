"""How long units take on a number of devices, scheduled as a run schedules them. Arithmetic alone: what a unit costs is the forecast's.

A stage begins when the one before is done (jobs/drive.py); inside it, whoever is idle takes the next unit of the list; a unit is not divided, and one
of several ranks takes as many devices. Left out: time in a queue, what ranks tell each other, and storage that more readers slow down.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """What goes on between two barriers: units of one stage, of `ranks` ranks each, in the list's order.

    `start_s`: seconds before a unit works, on any number of devices. `work_s`: device seconds of each unit after that, shared out over its ranks.
    """

    stage: str
    ranks: int
    start_s: float
    work_s: tuple[float, ...]

    def wall_s(self, devices: int) -> float:
        """Seconds on `devices`. Where a unit has more ranks than there are devices, its ranks share them."""
        together = min(self.ranks, devices)
        free_at = [0.0] * min(devices // together, len(self.work_s))
        for work in self.work_s:
            heapq.heapreplace(free_at, free_at[0] + self.start_s + work / together)
        return max(free_at, default=0.0)

    @property
    def longest_s(self) -> float:
        """Seconds on any number of devices at least: the longest unit."""
        return self.start_s + max(self.work_s, default=0.0) / self.ranks

    @property
    def device_s(self) -> float:
        """Seconds that devices are at work, whatever their number; of several ranks one is counted while a unit starts."""
        return sum(self.work_s) + self.start_s * len(self.work_s)

    @property
    def enough(self) -> int:
        """The least number of devices on which it takes no longer than on any."""
        most = max(1, self.ranks * len(self.work_s))
        shortest = self.wall_s(most)
        return 1 + bisect.bisect_left(range(1, most + 1), True, key=lambda devices: self.wall_s(devices) <= shortest * (1 + 1e-9))


def wall_s(blocks: list[Block], devices: int) -> float:
    """Seconds of all `blocks`, one after the other, on `devices`."""
    return sum(block.wall_s(devices) for block in blocks)


def enough(blocks: list[Block]) -> int:
    """From how many devices on nothing gets faster."""
    return max((block.enough for block in blocks), default=1)

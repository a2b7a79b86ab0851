"""A share of a run: what one of several workers that know nothing of each other does. Jobs of an array, tasks of an srun: all end here.

A worker first takes the units whose turn is its own, then any that nobody is at work on: so what a lost worker left is done by the others. It waits
for others only as long as it takes to tell a dead worker from a slow one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from jobs import failures
from jobs.claim import FOLDER
from jobs.dispatch import Local, Outcome
from jobs.drive import Failed, frontier, publish
from jobs.gang import Gang
from jobs.plan import Run
from jobs.stages import STAGES
from jobs.unit import Unit

ORDER = [stage.NAME for stage in STAGES]
ROUNDED = ("generate", "label")
PROBES = 8  # units that are not its own a worker tries between two listings: a thousand idle ones must not each read a thousand claims
PATIENCE = 1.5  # times execution.stale_s: after that, units that others are at work on are theirs


@dataclass(frozen=True)
class Link:
    """Work up to and including a stage; of generation and labelling, in round `round` (from 0). `units` are expected, of at most `ranks` ranks."""

    stage: str
    round: int = 0
    units: int = 1
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.round}" if self.stage in ROUNDED else self.stage

    def covers(self, run: Run, stage: str) -> bool:
        """Whether what is next in `run`, units of `stage`, is this link's or of one before."""
        if self.stage in ROUNDED and stage in ROUNDED:
            mine = stage == "generate" or self.stage == "label"
            return rounds_begun(run) <= self.round + mine
        return ORDER.index(stage) <= ORDER.index(self.stage)


def rounds_begun(run: Run) -> int:
    """Rounds of generation that are listed, of the scope and generator that have most."""
    listed = [name.rpartition("/")[0] for name in run.under("rounds/") if name.endswith(".json")]
    return max((listed.count(folder) for folder in set(listed)), default=0)


def work(run: Run, link: Link, index: int, count: int, machines: tuple[int, int, str] = (1, 0, "")):
    """Share `index` of `count` of what `link` covers. `machines` (world.machines) have this share together, and the first leads.

    Failed, if units failed here; a unit that failed `execution.tries` times anywhere is left alone until somebody starts it afresh.
    """
    from jobs.attempt import as_rank

    nodes, node, name = machines
    if nodes == 1:
        return _work(run, link, index, count, None)
    gang = Gang(run.url, f"{name}-{index}", nodes, node, heartbeat_s=run.config.execution.heartbeat_s, stale_s=run.config.execution.stale_s)
    if node:
        return gang.follow(as_rank)
    with gang:
        _work(run, link, index, count, gang)


def _work(run: Run, link: Link, index: int, count: int, gang: Gang | None):
    failed: dict[str, Outcome] = {}
    waited_s, pause_s, execution = 0.0, 0.0, run.config.execution
    with Local(run.config, gang) as backend:
        while units := _next(run, link, index, count, failed):
            outcomes = list(backend.run(run.url, run.config, units))
            failed |= {outcome.unit.identity: outcome for outcome in outcomes if outcome.state == "failed"}
            if all(outcome.state == "busy" for outcome in outcomes):
                if waited_s > PATIENCE * execution.stale_s:
                    break
                pause_s = min(max(2 * pause_s, execution.heartbeat_s), execution.stale_s / 2)  # less and less often: a listing is dear to a file server
                time.sleep(pause_s)
                waited_s += pause_s
            else:
                waited_s = pause_s = 0.0
            run.refresh()
    if failed:
        raise Failed(list(failed.values()), run.url)
    if frontier(run) is None:
        publish(run)


def _next(run: Run, link: Link, index: int, count: int, failed: dict) -> list[Unit]:
    """What to try now: of this share, and when that is done of all, beginning at different places."""
    if not (found := frontier(run)) or not link.covers(run, found[0]):
        return []
    stage, pending = found
    tries = run.config.execution.tries
    able = [unit for unit in pending if unit.ranks <= link.ranks and unit.identity not in failed]
    failing = failures.named(run.under(failures.FOLDER))
    able = [u for u in able if u.identity not in failing or not (before := failures.read(run.storage, u.identity)) or before.tries < tries]
    claimed = {name.rpartition("-")[0] for name in run.under(FOLDER)}
    free = [unit for unit in able if FOLDER + unit.identity not in claimed]
    own = {unit.identity for unit in run.units(stage)[index::count]}
    if mine := [unit for unit in free if unit.identity in own]:
        return mine
    others = free or able
    start = index * len(others) // count
    return (others[start:] + others[:start])[:PROBES]

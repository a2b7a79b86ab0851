"""How the attempts at a run's units went, from their claims, the done records and accounting: what was begun again and why, and which nodes are ill."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from jobs import accounting, claim
from jobs.claim import FOLDER, Attempt
from jobs.plan import Run
from jobs.unit import Unit

UNKNOWN = "killed: accounting does not know yet by what"
ILL = 2  # so many different units fail on a node that is ill, each of them there alone


@dataclass(frozen=True)
class Ended:
    """An attempt that is over without having done its unit, and why, in a few words."""

    attempt: Attempt
    cause: str


def attempts(run: Run) -> list[Attempt]:
    """Those that left a claim: at work, or over without success, or with success after another."""
    found = (claim.read(run.storage, name) for name in run.names if name.startswith(FOLDER) and name.endswith(".json"))
    return sorted((one for one in found if one), key=lambda one: (one.began_s, one.identity, one.number))


def ended(run: Run) -> list[Ended]:
    """Every attempt that is known to be over and did not do its unit. Of a killed one that nobody has overtaken, accounting or this machine must know."""
    every = attempts(run)
    last = {(one.identity, one.number) for one in {one.identity: one for one in sorted(every, key=lambda one: one.number)}.values()}
    words = accounting.ends(run.storage, [one for one in every if one.how in ("", "interrupted")])
    found = []
    for one in every:
        word = words.get((one.identity, one.number))
        if one.how in ("failed", "killed"):
            found.append(Ended(one, one.cause))
        elif one.how == "superseded":
            found.append(Ended(one, "taken for dead, for its heart did not beat"))
        elif one.how == "interrupted":
            found.append(Ended(one, word or "asked to stop"))
        elif not one.how and (word or claim.dead(vars(one)) or (one.identity, one.number) not in last):
            found.append(Ended(one, word or (UNKNOWN if one.job else "killed")))
    return found


def at_work(run: Run, units: list[Unit]) -> list[tuple[Unit, Attempt, dict]]:
    """Of `units`, those that somebody is at work on, with the attempt and the last word of its heartbeat."""
    live = living(run)
    return [(unit, live[unit.identity], beat(run, live[unit.identity])) for unit in units if unit.identity in live]


def living(run: Run) -> dict[str, Attempt]:
    """Attempts that nothing speaks against, by their unit's identity."""
    over = {(one.attempt.identity, one.attempt.number) for one in ended(run)}
    return {one.identity: one for one in attempts(run) if not one.how and (one.identity, one.number) not in over}


def beat(run: Run, one: Attempt) -> dict:
    """The last word of its heartbeat."""
    try:
        return json.loads(run.storage.read(claim.beat_name(one.identity, one.number)))
    except (FileNotFoundError, ValueError):  # has not beaten yet, or finished since
        return {}


def ill_nodes(run: Run) -> dict[str, int]:
    """SLURM's nodes to leave out: node -> units that failed there since the last submission and on no other node, ILL at least, while another node did some."""
    since = max((json.loads(run.storage.read(name))["when_s"] for name in run.names if name.startswith("state/submissions/")), default=0.0)
    where: dict[str, set[str]] = {}
    for one in ended(run):
        if one.attempt.job and one.attempt.began_s >= since and (one.attempt.how == "failed" or one.cause == "its node failed"):
            where.setdefault(one.attempt.identity, set()).add(one.attempt.node)
    count = Counter(next(iter(nodes)) for nodes in where.values() if len(nodes) == 1)
    well = {record.get("node") for record in done_records(run) if record.get("ended_s", 0) >= since}
    return {node: units for node, units in count.items() if node and units >= ILL and well - {node, None}}


def done_records(run: Run) -> list[dict]:
    """What was taken down of every unit that this run's workers finished: node, stage, unit, ended_s, seconds, core_seconds, peak_gb."""
    found = []
    for name in (name for name in run.names if name.startswith("state/done/")):
        try:
            found.append(json.loads(run.storage.read(name)))
        except (FileNotFoundError, ValueError):  # a power cut took it
            continue
    return found

"""Looking on while jobs elsewhere do a run: the same display as at work, fed by markers. Ending it ends nothing else."""

from __future__ import annotations

import time
from contextlib import suppress

from jobs import chain, failures, status
from jobs.dispatch import Outcome
from jobs.drive import Failed, Show, frontier, publish, reaches
from jobs.plan import PlanError, Run

LOOK_S, ASK_S = 2.0, 10.0  # at markers; at SLURM's queue
LAG_S, BLIND_S = 30.0, 90.0  # an empty queue may precede the last failure, and the last marker, which NFS shows a minute late


def watch(run: Run, show: Show, until: str | None = None):
    """Until `run` is complete, or through stage `until`. Failed, or PlanError, once no job is left that could complete it."""
    known, asked_s, empty_since = {}, 0.0, None
    while (work := frontier(run)) and (until is None or reaches(work[0], until)):
        stage, pending = work
        show.stage(stage, len(pending), len(run.units(stage)) - len(pending))
        for unit in pending:
            failure = failures.read(run.storage, unit.identity)
            if failure and known.get(unit.identity) != failure:
                known[unit.identity] = failure
                show.outcome(Outcome(unit, "failed", f"{failure.reason} (on {failure.node}, try {failure.tries})"))
        if time.monotonic() - asked_s > ASK_S:
            asked_s = time.monotonic()
            with suppress(RuntimeError):  # slurmctld restarts, a busy controller: not knowing is no end
                empty_since = None if chain.queued(run) else empty_since or asked_s
        if empty_since and time.monotonic() - empty_since > LAG_S:
            left = {unit.identity: unit for unit in pending}  # also those whose last job was killed: accounting may know by what
            failed = [Outcome(left[one.identity], "failed", f"{one.reason} (on {one.node})") for one in status.failed(run) if one.identity in left]
            if failed:
                raise Failed(failed, run.url)
        if empty_since and time.monotonic() - empty_since > BLIND_S:
            left_over = f"SLURM has no job of {run.url} left, and {len(pending)} units of {stage} are not done"
            raise PlanError(f"{left_over}: vhs status {run.url} says what is known, the same command submits them again")
        time.sleep(LOOK_S)
        run.refresh()
    publish(run)

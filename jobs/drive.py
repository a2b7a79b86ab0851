"""From the first stage with work left to the last: `vhs run`. Every start is the same function of what is committed."""

from __future__ import annotations

import json
import time

from jobs import plan
from jobs.dispatch import Local, Outcome
from jobs.plan import Run
from jobs.stages import STAGES
from jobs.unit import Unit
from shards import manifest

BUSY_WAIT_S = 0.5


class Failed(Exception):
    """Units that failed; the message groups them. Everything else that could be done is done."""

    def __init__(self, outcomes: list[Outcome], url: str):
        last = {outcome.error.strip().splitlines()[-1]: outcome for outcome in outcomes}
        lines = [
            f"{sum(o.error.strip().splitlines()[-1] == reason for o in outcomes)} x {outcome.unit.stage} ({outcome.unit.path}): {reason}"
            for reason, outcome in last.items()
        ]
        super().__init__(
            f"{len(outcomes)} units failed:\n  "
            + "\n  ".join(lines)
            + f"\nTracebacks are in {url}/state/failures. The same command tries again."
        )


class Show:
    """What a run tells while it goes; the command line overrides it with a progress display."""

    def stage(self, name: str, pending: int, done: int): ...
    def outcome(self, outcome: Outcome): ...
    def step(self, path: str, step: int, total: int, metrics: dict): ...


def frontier(run: Run) -> tuple[str, list[Unit]] | None:
    """The first stage with unfinished units, and those units. Generation and labelling alternate until the quota is met, for a finished round's
    labels name the next round's units; when nothing is left the run is complete."""
    for stage in STAGES:
        pending = [unit for unit in run.units(stage.NAME) if not run.done(unit)]
        if pending:
            return stage.NAME, pending
    return None


def drive(run: Run, *, reuse: str | None = None, only: str | None = None, show: Show | None = None):
    """Work until the run is complete, or until stage `only` is. Failed if units fail."""
    show = show or Show()
    with Local(run.config) as backend:
        while (work := frontier(run)) and (only is None or _reaches(work[0], only)):
            stage, pending = work
            if reuse and plan.adopt(run, pending, reuse):
                run.refresh()
                continue
            show.stage(stage, len(pending), len(run.units(stage)) - len(pending))
            outcomes = []
            for outcome in backend.run(run.url, run.config, pending, show.step):
                show.outcome(outcome)
                outcomes.append(outcome)
            if failed := [outcome for outcome in outcomes if outcome.state == "failed"]:
                raise Failed(failed, run.url)
            if all(outcome.state == "busy" for outcome in outcomes):
                time.sleep(BUSY_WAIT_S)
            run.refresh()
    publish(run)


def _reaches(stage: str, only: str) -> bool:
    order = [s.NAME for s in STAGES]
    return order.index(stage) <= order.index(only)


def publish(run: Run):
    """The views that people and plain tools look for, made anew from the markers; vhs itself never reads them.

    report/index.html and summary.json at fixed names, rejects.json beside the real images, and a shards.txt in every folder of shards.
    """
    for path in (name for name in run.names if name.startswith("report-")):
        folder = run.marker(path).folder
        for name in ("index.html", "summary.json"):
            run.storage.put(f"report/{name}", run.storage.read(f"{folder}/{name}"))
    for folder in sorted({name.rpartition("/")[0] for name in run.names if name.endswith(".tar")}):
        manifest.write_shards_txt(run.storage, folder)
    rejects = [
        reject
        for name in run.names
        if name.startswith("real/") and name.endswith(".parquet")
        for reject in run.marker(name).facts["rejects"]
    ]
    run.storage.put("real/rejects.json", json.dumps(rejects, indent=1).encode())

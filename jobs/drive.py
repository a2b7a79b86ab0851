"""From the first stage with work left to the last: `vhs run`. Every start is the same function of what is committed."""

from __future__ import annotations

import json
import time

from jobs import generators, plan
from jobs.dispatch import Outcome, backend_of
from jobs.plan import Run
from jobs.stages import STAGES
from jobs.unit import Unit
from shards import manifest

BUSY_WAIT_S = 0.5


class Failed(Exception):
    """Units that failed; the message groups them by reason. Everything else of their stage is done."""

    def __init__(self, outcomes: list[Outcome], url: str):
        by_reason: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            by_reason.setdefault(outcome.error, []).append(outcome)
        lines = [f"  {len(group)} x {group[0].unit.stage} ({group[0].unit.path}): {reason}" for reason, group in by_reason.items()]
        after = f"Tracebacks are in {url}/state/failures. The same command tries again."
        super().__init__("\n".join([f"{len(outcomes)} units failed:", *lines, after]))


class Show:
    """What a run tells while it goes; the command line overrides it with a progress display."""

    def stage(self, name: str, pending: int, done: int): ...
    def outcome(self, outcome: Outcome): ...
    def step(self, path: str, step: int, total: int, metrics: dict): ...


def frontier(run: Run) -> tuple[str, list[Unit]] | None:
    """The first stage with unfinished units, and those units. Generation and labelling alternate until the quota is met, for a finished round's
    labels name the next round's units; when nothing is left the run is complete."""
    *_, (stage, units) = run.named()
    pending = [unit for unit in units if unit.marker not in run.names]  # as run.done, without a call for each of thousands at every look
    return (stage, pending) if pending else None


def drive(run: Run, *, on: str = "local", reuse: str | None = None, only: str | None = None, show: Show | None = None):
    """Work until the run is complete, or until stage `only` is, on this machine or on the Ray cluster around it (`on`: local | ray). Failed if
    units fail."""
    show, pause_s = show or Show(), BUSY_WAIT_S
    with backend_of(on)(run.config) as backend:
        while (work := frontier(run)) and (only is None or reaches(work[0], only)):
            stage, pending = work
            if stage == "train":
                check_judged(run)
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
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, max(BUSY_WAIT_S, run.config.execution.heartbeat_s))  # each look lists the run, which is dear to a file server
            else:
                pause_s = BUSY_WAIT_S
            run.refresh()
    publish(run)


def check_judged(run: Run):
    """PlanError where generated images wait for a person's word (label_by hand)."""
    from jobs import rounds  # pandas

    if scopes := rounds.waiting(run):
        raise plan.PlanError(
            f"label_by hand: the images drawn for {', '.join(scopes)} wait for a person. vhs labels {run.url} export FILE.csv --images DIR, "
            f"write yes or no under `accepted`, vhs labels {run.url} import FILE.csv, then run the same command again"
        )


def reaches(stage: str, only: str) -> bool:
    """Whether `stage` has to be done for stage `only` to be. Generation is done when labels say so."""
    order = [s.NAME for s in STAGES]
    return order.index(stage) <= order.index("label" if only == "generate" else only)


def publish(run: Run):
    """The views that people and plain tools look for, made anew from the markers; vhs itself never reads them. And checkpoints nobody needs go.

    The report's files (index.html, summary.json, predictions/) at fixed names, the page with what `vhs tune` found in it, rejects.json beside the
    real images and those from outside, and a shards.txt in every folder of shards.
    """
    from jobs import search

    done = [unit for _, units in run.named() for unit in units if run.done(unit)]
    for unit in (unit for unit in done if unit.stage == "report"):
        for name in run.marker(unit.marker).files:
            data = run.storage.read(f"{run.marker(unit.marker).folder}/{name}")
            run.storage.put(f"report/{name}", search.shown(run, data) if name == "index.html" else data)
    for folder in sorted({unit.path.rpartition("/")[0] for unit in done if run.marker(unit.marker).shard}):
        mine = {unit.marker for unit in done}
        manifest.write_shards_txt(run.storage, folder, keep=mine.__contains__)
    for folder, rejects in _rejects(run, done).items():
        run.storage.put(f"{folder}/rejects.json", json.dumps(rejects, indent=1).encode())
    finished = {unit.identity for unit in done}
    for name in (name for name in run.storage.list("checkpoints/") if name.split("/")[1] in finished):
        run.storage.delete(name)


def _rejects(run: Run, done: list[Unit]) -> dict[str, list[dict]]:
    """By folder what was brought and is not used: of the data, and of each set of a generator outside of the run."""
    found = {"real": []}
    for unit in done:
        from_outside = unit.stage == "generate" and "sources" in unit.params
        if from_outside or unit.stage in ("ingest", "split"):
            folder = f"generated/{generators.place(generators.made_by(unit.params), unit.params['scope'])}" if from_outside else "real"
            found.setdefault(folder, []).extend(run.marker(unit.marker).facts["rejects"])
    return found

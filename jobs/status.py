"""What a run has done, is doing and has left, read from its folder: no torch, no daemon."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from jobs import accounting, failures, generators, history
from jobs.failures import Failure
from jobs.plan import Run
from jobs.stages import STAGES
from jobs.unit import Unit
from shards import manifest

WINDOW_S = 3600  # what was done in this time tells the rate
SLOW, SLOW_S = 3, 60  # a straggler has been at work this many times its stage's median, and so many seconds at least


@dataclass(frozen=True)
class Working:
    """A unit that somebody is at work on. `beat`: the last word of its heartbeat ({step, total, …} where it trains)."""

    unit: str
    node: str
    seconds: float
    beat: dict


@dataclass(frozen=True)
class StageStatus:
    """Units of one stage. `total` None: they cannot be named yet, stages before are unfinished. `rate`: units an hour, while it goes; `eta_s`: until all are
    done at that rate; both None where nothing can be said."""

    name: str
    done: int
    total: int | None
    running: list[Working]
    failed: list[str]
    rate: float | None = None
    eta_s: float | None = None

    @property
    def waiting(self) -> int:
        return (self.total or 0) - self.done - len(self.running) - len(self.failed)

    def stragglers(self, typical_s: float | None) -> list[Working]:
        """Those at work for SLOW times as long as a finished unit of the stage took."""
        return [one for one in self.running if typical_s and one.seconds > max(SLOW * typical_s, SLOW_S)]


def status(run: Run) -> list[StageStatus]:
    """Every stage in order."""
    named, records = dict(run.named()), history.done_records(run)
    return [
        _of(run, stage.NAME, named[stage.NAME], records) if stage.NAME in named else StageStatus(stage.NAME, 0, None, [], []) for stage in STAGES
    ]


def _of(run: Run, name: str, units: list[Unit], records: list[dict]) -> StageStatus:
    left = [unit for unit in units if not run.done(unit)]
    now = time.time()
    running = [Working(unit.path, one.node, now - one.began_s, beat) for unit, one, beat in history.at_work(run, left)] if left else []
    busy = {one.unit for one in running}
    failing = [failure.unit for failure in failed(run) if failure.stage == name and failure.unit not in busy] if left else []
    ends = sorted(record["ended_s"] for record in records if record["stage"] == name and record.get("ended_s", 0) > now - WINDOW_S)
    rate = 3600 * (len(ends) - 1) / (ends[-1] - ends[0]) if left and len(ends) > 1 and ends[-1] > ends[0] else None
    return StageStatus(name, len(units) - len(left), len(units), running, failing, rate, 3600 * len(left) / rate if rate else None)


def typical_seconds(run: Run) -> dict[str, float]:
    """stage -> the median time of its finished units."""
    by_stage: dict[str, list[float]] = {}
    for record in history.done_records(run):
        if "seconds" in record:
            by_stage.setdefault(record["stage"], []).append(record["seconds"])
    return {stage: statistics.median(taken) for stage, taken in by_stage.items()}


def failed(run: Run) -> list[Failure]:
    """What is known of every unit that is not done and whose last try failed, or brought its job down, by reason."""
    read = [failures.read(run.storage, identity) for identity in failures.named(run.under(failures.FOLDER))]
    found = {failure.identity: failure for failure in read if failure}
    units = {unit.identity: unit for _, named in run.named() for unit in named if not run.done(unit)}
    last = {one.attempt.identity: one for one in history.ended(run) if not one.attempt.how}
    for identity in last.keys() & units.keys() - found.keys():  # killed, and nobody has tried again who would have taken it down
        unit, one = units[identity], last[identity]
        if one.cause in accounting.UNITS_OWN:
            reason, where = f"its job ended: {one.cause}", (one.attempt.node, one.attempt.job)
            found[identity] = Failure(identity, unit.stage, unit.path, reason, "", 1, *where, one.attempt.began_s)
    return sorted(found.values(), key=lambda failure: (failure.reason, failure.unit))


def log_of(run: Run, failure: Failure) -> str:
    """What the job said in which a unit failed, the end of it; "" where it was no job of SLURM's, or its log is gone."""
    logs = sorted(run.storage.shared.glob(f"state/slurm/*/*/{failure.job}_0_log.out")) if failure.job else []
    return logs[-1].read_bytes()[-4000:].decode(errors="replace") if logs else ""


@dataclass(frozen=True)
class Cost:
    """What a stage's finished units took, as far as it was recorded: units taken over from another run cost nothing here."""

    stage: str
    units: int
    core_seconds: float
    seconds: float  # of all units one after the other
    peak_gb: float  # of the largest process


def costs(run: Run) -> list[Cost]:
    """The cost of every stage that has one, in order."""
    by_stage: dict[str, list[dict]] = {stage.NAME: [] for stage in STAGES}
    for record in history.done_records(run):
        if "core_seconds" in record:
            by_stage[record["stage"]].append(record)
    return [
        Cost(stage, len(records), sum(r["core_seconds"] for r in records), sum(r["seconds"] for r in records), max(r["peak_gb"] for r in records))
        for stage, records in by_stage.items()
        if records
    ]


def per_accepted(run: Run) -> float | None:
    """Core-seconds of drawing and measuring for each accepted image; None where a part of them is not recorded, or none was accepted."""
    units = {stage: units for stage, units in run.named() if stage in ("generate", "label")}
    spent = [cost for cost in costs(run) if cost.stage in units]
    accepted = sum(counts["accepted"] for counts in generation(run).values())
    if not accepted or [cost.units for cost in spent] != [sum(map(run.done, of)) for of in units.values()]:
        return None
    return sum(cost.core_seconds for cost in spent) / accepted


def generation(run: Run) -> dict[str, dict[str, int]]:
    """scope, and of a control generator/scope -> {"produced", "accepted", and accepted of each class}, from the committed labels."""
    table: dict[str, dict[str, int]] = {}
    for unit in (unit for unit in dict(run.named()).get("label", []) if run.done(unit)):
        place = generators.place(generators.made_by(unit.params), unit.params["scope"])
        facts, row = run.marker(unit.marker).facts, table.setdefault(place, {"produced": 0, "accepted": 0})
        row["produced"] += facts["images"]
        for name, count in facts["accepted"].items():
            row["accepted"] += count
            row[name] = row.get(name, 0) + count
    return table


def validation(run: Run) -> list[tuple[str, float, int]]:
    """(arm, accuracy over seeds, images) on the inner validation of the scopes that `run` looks at, from their predictions."""
    import pandas as pd

    tables = [manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate")]
    rows = pd.concat(tables, ignore_index=True).query("role == 'validation'")
    return [
        (arm, float((of_arm.predicted == of_arm.label).mean()), of_arm.key.nunique()) for arm, of_arm in rows.groupby("arm", sort=False)
    ]

"""What a run has done, is doing and has left, read from its folder: no torch, no daemon."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jobs import failures
from jobs.failures import Failure
from jobs.plan import Run
from jobs.stages import STAGES
from jobs.unit import Unit
from shards import manifest


@dataclass(frozen=True)
class StageStatus:
    """Units of one stage. `total` None: they cannot be named yet, stages before are unfinished. `running`: (unit path, last word of its heartbeat)."""

    name: str
    done: int
    total: int | None
    running: list[tuple[str, dict]]
    failed: list[str]


def status(run: Run) -> list[StageStatus]:
    """Every stage in order."""
    named = dict(run.named())
    return [
        _of(run, stage.NAME, named[stage.NAME]) if stage.NAME in named else StageStatus(stage.NAME, 0, None, [], []) for stage in STAGES
    ]


def _of(run: Run, name: str, units: list[Unit]) -> StageStatus:
    left = [unit for unit in units if not run.done(unit)]
    running = [(unit.path, beat) for unit in left for beat in _beats(run, unit.identity)]
    failed = [unit.path for unit in left if f"state/failures/{unit.identity}.json" in run.names]
    return StageStatus(name, len(units) - len(left), len(units), running, failed)


def _beats(run: Run, identity: str) -> list[dict]:
    names = sorted(name for name in run.names if name.startswith(f"state/claims/{identity}/") and name.endswith(".beat"))
    try:
        return [json.loads(run.storage.read(names[-1]))] if names else []
    except FileNotFoundError:  # finished since the listing
        return []


def failed(run: Run) -> list[Failure]:
    """What is known of every unit whose last try failed and that is not done, by reason."""
    names = [name for name in run.names if name.startswith("state/failures/")]
    found = [failures.read(run.storage, name.rpartition("/")[2].removesuffix(".json")) for name in names]
    return sorted((failure for failure in found if failure), key=lambda failure: (failure.reason, failure.unit))


def log_of(run: Run, failure: Failure) -> str:
    """What the job said in which a unit failed, the end of it; "" where it was no job of SLURM's, or its log is gone."""
    logs = [name for name in run.names if failure.job and name.startswith("state/slurm/") and name.endswith(f"/{failure.job}_0_log.out")]
    return run.storage.read(logs[-1])[-4000:].decode(errors="replace") if logs else ""


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
    for name in (name for name in run.names if name.startswith("state/done/")):
        record = json.loads(run.storage.read(name))
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
    """scope -> {"produced", "accepted", and accepted of each class}, from the committed labels."""
    table: dict[str, dict[str, int]] = {}
    for unit in (unit for unit in dict(run.named()).get("label", []) if run.done(unit)):
        facts, row = run.marker(unit.marker).facts, table.setdefault(unit.params["scope"], {"produced": 0, "accepted": 0})
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

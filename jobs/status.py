"""What a run has done, is doing and has left, read from its folder: no torch, no daemon."""

from __future__ import annotations

import json
from dataclasses import dataclass

from jobs.plan import Run
from jobs.stages import STAGES


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
    found, open_stages = [], True
    for stage in STAGES:
        if not open_stages:
            found.append(StageStatus(stage.NAME, 0, None, [], []))
            continue
        units = run.units(stage.NAME)
        done = [unit for unit in units if run.done(unit)]
        running = [(unit.path, beat) for unit in units if not run.done(unit) for beat in _beats(run, unit.identity)]
        failed = [unit.path for unit in units if f"state/failures/{unit.identity}.txt" in run.names and not run.done(unit)]
        found.append(StageStatus(stage.NAME, len(done), len(units), running, failed))
        open_stages = len(done) == len(units)
    return found


def _beats(run: Run, identity: str) -> list[dict]:
    names = sorted(name for name in run.names if name.startswith(f"state/claims/{identity}/") and name.endswith(".beat"))
    try:
        return [json.loads(run.storage.read(names[-1]))] if names else []
    except FileNotFoundError:  # finished since the listing
        return []


def generation(run: Run) -> dict[str, dict[str, int]]:
    """scope -> {"produced", "accepted", and accepted of each class}, from the committed labels."""
    table: dict[str, dict[str, int]] = {}
    for name in run.names:
        if name.startswith("labels/"):
            scope, facts = name.split("/")[1], run.marker(name).facts
            row = table.setdefault(scope, {"produced": 0, "accepted": 0})
            row["produced"] += facts["images"]
            for cls, count in facts["accepted"].items():
                row["accepted"] += count
                row[cls] = row.get(cls, 0) + count
    return dict(sorted(table.items()))

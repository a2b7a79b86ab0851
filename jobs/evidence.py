"""What a study keeps: a folder of small text files that belongs into a repository, beside the program that made them.

    protocol.json          what will be done and said, frozen before the first run: a study that says otherwise is another study
    RUN-SCOPE.csv          the record of a finished scope of a run (vhs/metrics/record.py), written whole or not at all, never over another
    looks.json             every set of records that was tabled, and every other table of them, once each: how often the study has been opened
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from jobs import history, models
from jobs.config import Config, changed
from jobs.plan import SOURCES, PlanError, Run
from jobs.unit import digest
from shards import manifest
from shards.storage import open_storage
from vhs.study import Study

if TYPE_CHECKING:
    from vhs.metrics.record import Record

HERE = Path(__file__).resolve().parents[1]
KEPT = HERE / "vhs" / "evidence"  # of the studies that come with the program
PROTOCOL, LOOKS = "protocol.json", "looks.json"


class Evidence:
    """The records of one study in `folder`, on disk or in object storage."""

    def __init__(self, folder: Path | str):
        self.folder, self._storage = folder, open_storage(folder)

    def freeze(self, protocol: dict):
        """PlanError unless `protocol` is what the study was begun with."""
        data = json.dumps(protocol, indent=1).encode() + b"\n"
        if not self._storage.exists(PROTOCOL):
            self._storage.commit(PROTOCOL, data)
        frozen = {name: field.default for name, field in Study.model_fields.items()} | json.loads(self._storage.read(PROTOCOL))  # begun before a key was there
        if keys := changed(frozen, json.loads(data)):
            raise PlanError(
                f"{self.folder}/{PROTOCOL} says otherwise than this study: {', '.join(keys)} differ{'s' if len(keys) == 1 else ''}. What is said is fixed "
                "before it is looked at: write the former back, or give the changed study a name of its own"
            )

    def names(self) -> list[str]:
        """Of the records that are there."""
        return [path.removesuffix(".csv") for path in self._storage.list() if path.endswith(".csv")]

    def has(self, name: str, config: Config) -> bool:
        """Whether the record `name` is there. PlanError if it is, but of another science or other models than `config`'s."""
        if not self._storage.exists(f"{name}.csv"):
            return False
        about = self.about(name)
        keys = changed(_as_read_now(about["science"], config), config.science)
        keys += [f"models.{key}" for key in changed(about["models"], models.fingerprints(config))]
        if keys:
            raise PlanError(
                f"{self.folder}/{name}.csv is the record of another run: {', '.join(keys)} differ{'s' if len(keys) == 1 else ''} (it was made by vhs "
                f"{about.get('vhs')}). Write the former back; or give the study another name, or --records ANOTHER, and both are kept"
            )
        return True

    def read(self, name: str) -> Record:
        from vhs.metrics.record import decode

        return self._read(name, decode)

    def about(self, name: str) -> dict:
        """What the record `name` says of how it was made; its rows are not looked at."""
        from vhs.metrics.record import about

        return self._read(name, about)

    def _read(self, name: str, how: Callable):
        try:
            return how(self._storage.read(f"{name}.csv"))
        except ValueError as error:
            raise PlanError(f"{self.folder}/{name}.csv: {error}. Delete it, and it is made again") from None

    def write(self, record: Record):
        """Keep `record`. PlanError if another scope of its run was of other data: then neither says what the other rests on."""
        from vhs.metrics.record import encode

        for other in [name for name in self.names() if name.startswith(f"{record.about['run']}-")]:
            about = self.about(other)
            if about["run"] == record.about["run"] and about["data"] != record.about["data"]:
                raise PlanError(f"{self.folder}/{other}.csv was made of other data than {record.name}: put that data back, or give the study --records ANOTHER")
        self._storage.commit(f"{record.name}.csv", encode(record))

    def look(self, names: list[str], shown: list) -> list[dict]:
        """Count that these records are tabled, and show such figures; the same ones again are no further look, for they tell nothing new, but another
        analysis of them is -> every look so far."""
        looks = json.loads(self._storage.read(LOOKS)) if self._storage.exists(LOOKS) else []
        seen = digest([shown, *(hashlib.sha256(self._storage.read(f"{name}.csv")).hexdigest() for name in sorted(names))])[:12]
        if seen not in [look["at"] for look in looks]:
            looks.append({"at": seen, "records": len(names), "when": time.strftime("%Y-%m-%d", time.gmtime())})
            self._storage.put(LOOKS, json.dumps(looks, indent=1).encode() + b"\n")
        return looks


def record_of(run: Run, scope: str, study: str, name: str, vary: dict) -> Record:
    """The record of a scope whose predictions are there. ValueError where an image was answered twice, or not at all."""
    import pandas as pd

    from vhs import metrics, split
    from vhs.metrics.record import Record

    (splits,) = run.committed("split")
    tables = [manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate", scope=scope)]
    rows = pd.concat(tables, ignore_index=True).query("role == @metrics.HELD_OUT")
    rows = metrics.joined_once(rows, split.held_out(manifest.read(run.storage, splits).to_pandas(), scope))
    facts = [run.marker(path).facts for path in run.committed("train", scope=scope)]
    drawn = [run.marker(path).facts for path in run.committed("generate", scope=scope)]
    # what scopes share is the first one's cost
    paths = {unit.path for _, units in run.named() for unit in units if unit.params.get("scope", "split") == scope}
    spent = [record for record in history.done_records(run) if record["unit"] in paths]
    about = {
        "study": study, "run": name, "scope": scope, "vary": vary,
        "trained": {fact["arm"]: {what: fact[what] for what in ("real", "generated", "steps")} for fact in reversed(facts)},
        "patients_known": run.marker(splits).facts["patients_known"],
        "core_seconds": round(sum(record.get("core_seconds", 0) for record in spent)),
        "seconds": round(sum(record.get("seconds", 0) for record in spent)),  # of all units one after the other
        "machine": drawn[0]["numerics"] if drawn else {}, "vhs": version("vhs"), "commit": commit(),
        "data": digest(json.loads(run.storage.read(SOURCES)))[:12],
        "digest": digest([run.config.science, models.fingerprints(run.config)])[:12],
        "models": models.fingerprints(run.config), "science": run.config.science,
    }  # fmt: skip
    return Record(about, rows)


def commit() -> str | None:
    """The commit that this program was checked out at, "-dirty" where it was changed since; None where it is no checkout."""
    if not (HERE / ".git").exists():
        return None
    said = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude=*"], capture_output=True, text=True)
    return said.stdout.strip() or None


def _as_read_now(science: dict, config: Config) -> dict:
    """`science` with what has become a setting since: its default is what was done before. As it is, where this version reads it no more."""
    try:
        return Config.of(science, {"data": config.data}).science
    except ValueError:
        return science

"""What went wrong with a unit, for people and for whoever decides on another try: state/failures/<unit identity>.json, gone once the unit is done."""

from __future__ import annotations

import json
import time
import traceback
from dataclasses import asdict, dataclass

from jobs.claim import owner
from jobs.unit import Unit
from shards.credentials import without_keys
from shards.storage import Storage

FOLDER = "state/failures/"


@dataclass(frozen=True)
class Failure:
    """The last of `tries` failed tries at a unit. `reason` is one line; `node` and `job` (SLURM's, or "") say where it happened, `when_s` since the
    epoch."""

    identity: str
    stage: str
    unit: str
    reason: str
    traceback: str
    tries: int
    node: str
    job: str
    when_s: float


def record(storage: Storage, unit: Unit, error: BaseException) -> Failure:
    """Take down that a try at `unit`, here, ended with `error`."""
    here = owner()
    return blame(storage, unit, f"{type(error).__name__}: {error}", here["node"], here["job"], "".join(traceback.format_exception(error)))


def blame(storage: Storage, unit: Unit, reason: str, node: str, job: str, told: str = "") -> Failure:
    """Take down that a try at `unit` ended, for whom it may concern; `told`: its traceback, if it had one."""
    before = read(storage, unit.identity)
    reason, told = without_keys(reason), without_keys(told)
    failure = Failure(unit.identity, unit.stage, unit.path, reason, told, before.tries + 1 if before else 1, node, job, time.time())
    storage.put(path(unit.identity), json.dumps(asdict(failure), indent=1).encode())
    return failure


def read(storage: Storage, identity: str) -> Failure | None:
    """The failure of the unit with this identity, if its last try failed."""
    try:
        return Failure(**json.loads(storage.read(path(identity))))
    except FileNotFoundError:
        return None


def forget(storage: Storage, identity: str):
    """The unit is done, or starts afresh."""
    storage.delete(path(identity))


def path(identity: str) -> str:
    """Where the failure of a unit is told."""
    return f"{FOLDER}{identity}.json"


def named(names: list[str]) -> set[str]:
    """The identities of the units whose failures are told under these names."""
    return {name.removeprefix(FOLDER).removesuffix(".json") for name in names}

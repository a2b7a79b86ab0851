"""What went wrong with a unit, for people and for whoever decides on another try: state/failures/<unit identity>.json, gone once the unit is done."""

from __future__ import annotations

import json
import os
import socket
import time
import traceback
from dataclasses import asdict, dataclass

from jobs.unit import Unit
from shards.storage import Storage


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


def record(storage: Storage, unit: Unit, error: BaseException):
    """Take down that a try at `unit` ended with `error`."""
    before = read(storage, unit.identity)
    failure = Failure(
        unit.identity, unit.stage, unit.path, f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)),
        before.tries + 1 if before else 1, socket.gethostname(), _job(), time.time(),
    )  # fmt: skip
    storage.put(_path(unit.identity), json.dumps(asdict(failure), indent=1).encode())


def read(storage: Storage, identity: str) -> Failure | None:
    """The failure of the unit with this identity, if its last try failed."""
    try:
        return Failure(**json.loads(storage.read(_path(identity))))
    except FileNotFoundError:
        return None


def forget(storage: Storage, identity: str):
    """The unit is done, or starts afresh."""
    storage.delete(_path(identity))


def _job() -> str:
    """The job this process belongs to, as its scheduler names it, or ""."""
    get = os.environ.get
    if get("SLURM_ARRAY_JOB_ID"):
        return f"{get('SLURM_ARRAY_JOB_ID')}_{get('SLURM_ARRAY_TASK_ID')}"
    return get("SLURM_JOB_ID", "")


def _path(identity: str) -> str:
    return f"state/failures/{identity}.json"

"""What SLURM's accounting says of jobs that ended without a word of their own: killed, out of memory, on a node that failed.

It lags by seconds, and may be wrong meanwhile, or away for longer. Then nothing is known yet, which is no error. Its answers are kept in
state/accounting.json of the run, and it is asked at most once in ASK_S, however many look.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import datetime

from jobs import failures, scheduler
from jobs.claim import Attempt, close
from jobs.unit import Unit
from shards.storage import Storage

ASK_S, LAG_S = 60, 10  # between two questions; after its end a job may be accounted as something else for so long
WAIT_S, LOOK_S = 180, 2  # for a word that decides whether a unit is tried again
KEPT = "state/accounting.json"
WORDS = {
    "PREEMPTED": "preempted", "NODE_FAIL": "its node failed", "BOOT_FAIL": "its node failed", "TIMEOUT": "time limit", "CANCELLED": "cancelled",
    "REQUEUED": "requeued", "OUT_OF_MEMORY": "out of memory", "FAILED": "killed", "COMPLETED": "killed",
}  # fmt: skip
UNSAID = "killed: no accounting here to say by what"
UNITS_OWN = ("out of memory", "killed", UNSAID)  # what a unit may bring on itself: they count as tries, the others are the cluster's doing
SAYS_MEMORY = (b"exceeded memory limit", b"oom-kill", b"oom_kill", b"Out Of Memory")  # slurmstepd in the log of a job whose state is only FAILED


def ends(storage: Storage, attempts: list[Attempt]) -> dict[tuple[str, int], str]:
    """(unit identity, attempt number) -> why its job ended, a word of WORDS, of those `attempts` of which accounting knows that it did."""
    wanted = {attempt.job for attempt in attempts if attempt.job}
    runs = _runs(storage, wanted) if wanted else {}
    found = {}
    for attempt in attempts:
        states = runs.get(attempt.job, [])
        if attempt.run < len(states) and (word := WORDS.get(states[attempt.run])):
            found[attempt.identity, attempt.number] = "out of memory" if word == "killed" and _says_memory(storage, attempt.job) else word
    return found


def judge(storage: Storage, unit: Unit, before: tuple[Attempt, ...], tries: int) -> failures.Failure | None:
    """Take down of the attempts `before` at `unit` which were killed, and as a try what the unit may have brought on itself -> its failure, if that makes
    `tries`. Where what is not known yet decides that, wait for it. Only who holds the claim may ask, so that each counts once."""
    left, until, failure = [one for one in before if not one.how and one.job], time.monotonic() + WAIT_S, None
    while left:
        words = ends(storage, left)
        for one in left:
            if word := words.get((one.identity, one.number)):
                close(storage, one, word)
                if word in UNITS_OWN:
                    failure = failures.blame(storage, unit, f"its job ended: {word}", one.node, one.job)
        left = [one for one in left if (one.identity, one.number) not in words]
        known = failures.read(storage, unit.identity)
        if (known.tries if known else 0) + len(left) < tries:
            break
        if time.monotonic() > until:
            if _kept(storage).get("silent"):  # else a unit that kills its jobs would have every one of them
                for one in left:
                    close(storage, one, UNSAID)
                    failure = failures.blame(storage, unit, f"its job ended: {UNSAID}", one.node, one.job)
            break
        time.sleep(LOOK_S)
    return failure if failure and failure.tries >= tries else None


def _runs(storage: Storage, jobs: set[str]) -> dict[str, list[str]]:
    """job -> the state of each of its runs, from the first: a requeue begins another."""
    kept = _kept(storage)
    if time.time() - kept["asked_s"] < ASK_S and kept["asked_s"] <= time.time():
        return kept["jobs"]
    try:
        which = ("--duplicates", f"--jobs={','.join(sorted(jobs))}", "--format=JobID,Start,State,End")
        said = scheduler.ask("sacct", "-X", "-n", "-P", *which, SLURM_TIME_FORMAT="standard")
    except (OSError, RuntimeError):  # no SLURM here, or no accounting now
        said = None
    asked: dict[str, list[str]] = {}
    for job, _, state, end in sorted(line.split("|") for line in (said or "").splitlines() if line.count("|") == 3):
        asked.setdefault(job, []).append(state.split()[0] if _settled(end) else "")
    kept = {"asked_s": time.time(), "jobs": kept["jobs"] | asked, "silent": said is None}
    storage.put(KEPT, json.dumps(kept).encode(), durable=False)
    return kept["jobs"]


def _kept(storage: Storage) -> dict:
    try:
        return json.loads(storage.read(KEPT))
    except (FileNotFoundError, ValueError):
        return {"asked_s": 0.0, "jobs": {}}


def _settled(end: str) -> bool:
    """Whether a job's end, as sacct prints it, is so long ago that its state is true."""
    with suppress(ValueError):
        return time.time() - datetime.fromisoformat(end).timestamp() > LAG_S
    return False  # "Unknown": it has not ended


def _says_memory(storage: Storage, job: str) -> bool:
    logs = (storage.shared / "state" / "slurm").rglob(f"{job}_0_log.out")
    return any(word in log.read_bytes()[-8000:] for log in logs for word in SAYS_MEMORY)

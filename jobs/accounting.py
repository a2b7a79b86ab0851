"""What SLURM's accounting says of jobs that ended without a word of their own: killed, out of memory, on a node that failed.

It lags by seconds and may be away for longer. Then nothing is known yet, which is no error. Its answers are kept in state/accounting.json of the run, and it
is asked at most once in ASK_S, however many look.
"""

from __future__ import annotations

import json
import time

from jobs import failures, scheduler
from jobs.claim import Attempt
from jobs.unit import Unit
from shards.storage import Storage

ASK_S = 60
KEPT = "state/accounting.json"
WORDS = {
    "PREEMPTED": "preempted", "NODE_FAIL": "its node failed", "BOOT_FAIL": "its node failed", "TIMEOUT": "time limit", "CANCELLED": "cancelled",
    "REQUEUED": "requeued", "OUT_OF_MEMORY": "out of memory", "FAILED": "killed", "COMPLETED": "killed",
}  # fmt: skip
UNITS_OWN = ("out of memory", "killed")  # what a unit may bring on itself: they count as tries, the others are the cluster's doing
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


def blame(storage: Storage, unit: Unit, killed: Attempt) -> failures.Failure | None:
    """Take down the end of the attempt `killed` as a try at `unit`, if the unit may have brought it on itself -> the failure."""
    word = ends(storage, [killed]).get((killed.identity, killed.number))
    return failures.blame(storage, unit, f"its job ended: {word}", killed.node, killed.job) if word in UNITS_OWN else None


def _runs(storage: Storage, jobs: set[str]) -> dict[str, list[str]]:
    """job -> the state of each of its runs, from the first: a requeue begins another."""
    try:
        kept = json.loads(storage.read(KEPT))
    except (FileNotFoundError, ValueError):
        kept = {"asked_s": 0.0, "jobs": {}}
    if time.time() - kept["asked_s"] < ASK_S and kept["asked_s"] <= time.time():
        return kept["jobs"]
    try:
        said = scheduler.ask("sacct", "-X", "-n", "-P", "--duplicates", f"--jobs={','.join(sorted(jobs))}", "--format=JobID,Start,State")
    except (OSError, RuntimeError):  # no SLURM here, or no accounting now
        said = ""
    rows = sorted(line.split("|") for line in said.splitlines() if line.count("|") == 2)
    asked: dict[str, list[str]] = {}
    for job, _, state in rows:
        asked.setdefault(job, []).append(state.split()[0])
    kept = {"asked_s": time.time(), "jobs": kept["jobs"] | asked}
    storage.put(KEPT, json.dumps(kept).encode(), durable=False)
    return kept["jobs"]


def _says_memory(storage: Storage, job: str) -> bool:
    logs = [name for name in storage.list("state/slurm/") if name.endswith(f"/{job}_0_log.out")]
    return any(word in storage.read(log)[-8000:] for log in logs for word in SAYS_MEMORY)

"""`vhs bench dispatch`: what handing out work costs beside the work, next to bare submitit and bare Ray.

A unit here has nothing to do. Counted of ours: its claim with a heartbeat, the word that it is done, and the release. Of submitit: a job's pickle written, read
in the job, and the result's written and read. Of Ray: a task sent out and its answer taken back. Commits of products are left out of all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from jobs.bench.race import Result, race, rows
from jobs.plan import Run
from jobs.unit import Unit


@dataclass(frozen=True)
class Timing:
    """Seconds that something took, with what belongs to it; None where it could not be tried."""

    what: str
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class Dispatch:
    bookkeeping: Result
    timings: list[Timing]

    def as_dict(self) -> dict:
        return {"bookkeeping": self.bookkeeping.as_dict(), "timings": [asdict(timing) for timing in self.timings]}


def dispatch(units: int = 1000, repeats: int = 3, shards: int = 10_000, scratch: str | None = None) -> Dispatch:
    """`scratch`: a folder on the file system to be measured; default: the system's for temporary files."""
    from jobs import world

    # Ray's driver is a process of its own: its threads would take more than half of the pace of what is beside it in one
    driver = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start_ray)
    with driver, tempfile.TemporaryDirectory(dir=scratch) as folder:
        contenders = {
            "vhs: claim, done, release": lambda: _claims(Path(folder) / "vhs", units),
            "submitit: job and result as files": lambda: _pickles(Path(folder) / "submitit", units),
            "Ray: a task and its answer": lambda: driver.submit(_tasks, units).result(),
        }
        rates = race(contenders, units, repeats, time.perf_counter)
        found = Result("dispatch", "units per second", world.cpu_name(), units, repeats, rows(rates))
        return Dispatch(found, [_restart(Path(folder) / "run", shards), _submission(Path(folder) / "jobs", units)])


def _nothing():
    return None


def _claims(folder: Path, units: int):
    from jobs.attempt import tell_done
    from jobs.claim import Claim
    from jobs.cost import Meter
    from jobs.unit import Unit
    from shards.storage import open_storage

    storage = open_storage(folder)
    for number in range(units):
        unit = Unit("generate", f"generated/split/small/{number:05d}", "parquet", {}, {}, {})
        with Claim.take(storage, unit.identity, heartbeat_s=2, stale_s=30):
            tell_done(storage, unit, Meter())
    shutil.rmtree(folder)


def _pickles(folder: Path, units: int):
    import pickle

    from submitit.core.utils import DelayedSubmission

    folder.mkdir()
    for number in range(units):
        DelayedSubmission(_nothing).dump(folder / f"{number}.pkl")
        answer = ("success", DelayedSubmission.load(folder / f"{number}.pkl").result())
        (folder / f"{number}_result.pkl").write_bytes(pickle.dumps(answer))
        pickle.loads((folder / f"{number}_result.pkl").read_bytes())
    shutil.rmtree(folder)


def _start_ray():
    import ray

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _node_ip_address="127.0.0.1")


def _tasks(units: int):
    import ray

    task = ray.remote(num_cpus=1)(_nothing)
    for _ in range(units):
        ray.get(task.remote())


def _restart(out: Path, shards: int) -> Timing:
    """From nothing in memory to what is left to do, in a run that has drawn and labelled all but a few of `shards` shards."""
    from jobs import plan
    from jobs.drive import frontier
    from vhs.measure import CLASSES

    run = fill(out, -(-shards // len(CLASSES)), until="label")
    for unit in frontier(run)[1][: -len(CLASSES)]:
        commit_nothing(run, unit)
    began = time.perf_counter()
    stage, pending = frontier(run := plan.reopen(str(out)))
    seconds = time.perf_counter() - began
    return Timing(f"restart over {len(run.units('generate'))} shards", seconds, f"finds {len(pending)} units of {stage} left, among {len(run.names)} files")


def fill(out: Path, a_class: int, until: str) -> Run:
    """A run with `a_class` shards of each class, done up to stage `until` by units that made nothing, under the names and in the markers of real ones."""
    from jobs import config, plan
    from jobs.drive import frontier

    settings = config.load("debug/demo", [f"generation.round_units={a_class}", "generation.max_rounds=1", f"generation.quota={100 * a_class}"])
    run = plan.start(settings, str(out))
    while (work := frontier(run))[0] != until:
        for unit in work[1]:
            commit_nothing(run, unit)
        run.refresh()
    return run


def commit_nothing(run: Run, unit: Unit):
    import pyarrow as pa

    from jobs.unit import Files, Table, commit
    from vhs.measure import CLASSES

    nothing = run.storage.work / "empty"
    nothing.mkdir(parents=True, exist_ok=True)
    facts = {"images": 8, "rejects": [], "sources": ["clinic"], "accepted": dict.fromkeys(CLASSES, 2)}
    rows = pa.table({"key": [f"{number:016x}" for number in range(8)]})
    commit(run.storage, unit, Files(facts) if unit.kind == "json" else Table(rows, facts), nothing)


def _submission(folder: Path, units: int) -> Timing:
    """One array of `units` jobs, each a unit, at a SLURM that is here. The jobs are held, and taken back."""
    what = f"{units} units planned and submitted in one array"
    if not shutil.which("sbatch") or os.system("sinfo >/dev/null 2>&1"):
        return Timing(what, None, "no SLURM here")
    from submitit import SlurmExecutor

    from jobs import scheduler
    from jobs.chain import Job
    from jobs.share import Link

    began = time.perf_counter()
    executor = SlurmExecutor(folder)
    executor.update_parameters(time=10, array_parallelism=units, additional_parameters={"hold": True})
    with executor.batch():
        jobs = [executor.submit(Job(str(folder), None, Link("generate", 0, units), number, units, 1)) for number in range(units)]
    seconds = time.perf_counter() - began
    scheduler.ask("scancel", jobs[0].job_id.partition("_")[0])
    return Timing(what, seconds, f"sbatch's part included; {len(jobs)} jobs")


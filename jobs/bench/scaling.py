"""`vhs bench scaling`: units that sleep, on one worker and on many of a real SLURM or Ray: what of the many is lost to handing out and to waiting.

The units, claims, shares, jobs and actors are those of a run; of a generation unit's work alone a sleep takes the place. Workers wait for one another
before their first, so the time is that of handing out work, not of queueing, starting Python and connecting, which is shown beside it.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs import history
from jobs.plan import Run
from jobs.unit import Table, Unit

STAGE = "generate"
EACH = 2  # units a worker
PATIENCE_S = 1800  # for the queue


@dataclass(frozen=True)
class Scaling:
    """`workers` did EACH units of `seconds` each in `wall_s` from when all were there, which took `start_s` from the submission. `efficiency`: their
    units a second and worker, of those of the first row."""

    backend: str
    workers: int
    seconds: float
    wall_s: float
    start_s: float
    efficiency: float


def scaling(on: str, workers: list[int], seconds: float, folder: Path, cluster: str | None) -> Iterator[Scaling]:
    """A row for each number of `workers`, on `on` (slurm: arrays at the site `cluster`; ray: actors of the cluster around), in runs made in `folder`,
    which every node must see. RuntimeError where the workers do not come."""
    one_s = None
    for count in workers:
        run = _drawable(folder / f"{on}-{count}", EACH * count)
        began_s = time.time()
        (_by_array if on == "slurm" else _by_actors)(run, count, seconds, cluster)
        words = [json.loads(file.read_text()) for file in _gate(run).iterdir()]
        if len(words) != count:
            raise RuntimeError(f"{len(words)} of {count} workers of {on} did the work: the others did not come, and the figure would be another's")
        run.refresh()
        there_s = max(word["came_s"] for word in words)
        wall_s = max(record["ended_s"] for record in history.done_records(run) if record["stage"] == STAGE) - there_s
        one_s = one_s or wall_s
        yield Scaling(on, count, seconds, wall_s, there_s - began_s, one_s / wall_s)


def _drawable(out: Path, units: int) -> Run:
    """A run in which everything is done that generation needs, and nothing of `units` units of it."""
    from jobs import plan
    from jobs.bench import dispatch
    from jobs.drive import frontier
    from vhs.measure import CLASSES

    dispatch.fill(out, -(-units // len(CLASSES)), until=STAGE)
    run = plan.reopen(str(out))
    for unit in frontier(run)[1][units:]:
        dispatch.commit_nothing(run, unit)
    run.refresh()
    return run


def _gate(run: Run) -> Path:
    folder = run.storage.shared / "gate"
    folder.mkdir(exist_ok=True)
    return folder


def _come(folder: Path, workers: int):
    """Wait until all `workers` have come here. A worker is a process."""
    mine = folder / f"{socket.gethostname()}-{os.getpid()}"
    if mine.exists():
        return
    part = mine.with_suffix(".part")
    part.write_text(json.dumps({"came_s": time.time()}))
    part.rename(mine)
    deadline = time.monotonic() + PATIENCE_S
    while sum(not one.suffix for one in folder.iterdir()) < workers:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not all of {workers} workers came within {PATIENCE_S} s")
        time.sleep(0.05)


def fall_asleep(gate: str, workers: int, seconds: float):
    """From now on this process sleeps where it would draw."""
    import pyarrow as pa

    from jobs.stages import BY_NAME

    def sleep(config, inputs, output) -> Table:
        _come(Path(gate), workers)
        time.sleep(seconds)
        return Table(pa.table({"key": ["0"]}), {"images": 1})

    BY_NAME[STAGE].work, BY_NAME[STAGE].TORCH = sleep, False


@dataclass(frozen=True)
class _Sleeper:
    """A job of the chain, asleep. What submitit pickles."""

    job: object
    sleep: tuple[str, int, float]

    def __call__(self):
        fall_asleep(*self.sleep)
        self.job()


def _by_array(run: Run, workers: int, seconds: float, cluster: str | None):
    from submitit import SlurmExecutor

    from jobs.chain import Job
    from jobs.share import Link
    from jobs.site import Site, forget_allocation

    forget_allocation()
    site = Site.load(cluster)
    resources = site.resources(STAGE)
    link = Link(STAGE, 0, EACH * workers)
    executor = SlurmExecutor(run.storage.shared / "state" / "slurm", python=site.command)
    executor.update_parameters(**resources.sbatch(1), setup=site.lines, job_name="vhs-bench-scaling", array_parallelism=workers, stderr_to_stdout=True)
    with executor.batch():
        jobs = [
            executor.submit(_Sleeper(Job(run.url, None, link, number, workers, 0), (str(_gate(run)), workers, seconds))) for number in range(workers)
        ]
    for job in jobs:
        job.result()


def _by_actors(run: Run, workers: int, seconds: float, cluster: str | None):
    from jobs.actors import Actors
    from jobs.drive import frontier

    asleep = {"env_vars": {"VHS_BENCH_SLEEP": json.dumps([str(_gate(run)), workers, seconds])}, "worker_process_setup_hook": "jobs.bench.scaling.set_up"}
    with Actors(run.config, workers, asleep) as backend:
        units: list[Unit] = frontier(run)[1]
        for outcome in backend.run(run.url, run.config, units):
            if outcome.state != "done":
                raise RuntimeError(f"{outcome.unit.path}: {outcome.state} {outcome.error}")


def set_up():
    """Of a Ray worker's process, before it does anything."""
    fall_asleep(*json.loads(os.environ["VHS_BENCH_SLEEP"]))

"""`vhs run --on slurm`: the whole run as a chain of job arrays, submitted at once through submitit. The run's folder stays the only state.

A link is one array: of a stage, or of a stage in one round of generation. It starts when the link before has ended, however that ended (afterany):
what counts is not how a job left but which markers there are. So every job asks the run itself what is to be done, up to its own link: first its
share, then what others left. Links of rounds that turn out not to be needed find nothing to do and end. A submission again names only what is missing.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass

from jobs import failures, generators, history, interrupt, scheduler, share, world
from jobs.drive import frontier
from jobs.plan import Run, reopen
from jobs.share import ORDER, ROUNDED, Link
from jobs.site import Site, forget_allocation

GRACE_S = 900  # no site gives a preempted job longer, and a TERM that nobody follows up must not hold a node for ever
AGAIN = 85  # how a job ends in a container, which has no scontrol: the script around it asks for the requeue
TEARDOWN = f'ended=$?; [ $ended -ne {AGAIN} ] || scontrol requeue "$SLURM_JOB_ID"; exit $ended'


def links(run: Run, until: str = ORDER[-1]) -> list[Link]:
    """The arrays that bring `run` from where it is through stage `until`, in order."""
    from jobs.forecast import forecast, sizes

    if not (work := frontier(run)):
        return []
    now, pending = work
    expected = {row.stage: row.units for row in forecast(run.config, sizes(run.config, run)).rows}
    listed = share.rounds_begun(run)
    chain = [Link(stage, 0, expected.get(stage, 0), _ranks(run, stage)) for stage in ORDER if stage not in ROUNDED]
    at = next(n for n, link in enumerate(chain) if ORDER.index(link.stage) > ORDER.index("label"))
    a_round = [Link(stage, n, _units_a_round(run), 1) for n in range(run.config.generation.max_rounds) for stage in ROUNDED]
    chain[at:at] = a_round
    first = Link(now, max(0, listed - 1) if now in ROUNDED else 0, len(pending), max(unit.ranks for unit in pending))
    here = next(n for n, link in enumerate(chain) if (link.stage, link.round) == (first.stage, first.round))
    last = ORDER.index("label" if until == "generate" else until)
    return [link for link in [first, *chain[here + 1 :]] if link.units and ORDER.index(link.stage) <= last]


def _ranks(run: Run, stage: str) -> int:
    config = run.config
    settings = {"labeller": config.labeller, "dreambooth": config.dreambooth, "train": config.classifier, "evaluate": config.classifier}
    return settings[stage].ranks if stage in settings else 1


def _units_a_round(run: Run) -> int:
    from jobs.forecast import sizes
    from vhs.measure import CLASSES

    strata = len(generators.wanted(run.config)) * len(CLASSES) * (sizes(run.config, run).sources if run.config.generation.by_source else 1)
    return len(run.scopes) * strata * run.config.generation.round_units


@dataclass(frozen=True)
class Job:
    """What submitit pickles: values alone, no state. Element `index` of the `count` of a link's array."""

    url: str
    scope: str | None
    link: Link
    index: int
    count: int
    max_requeues: int

    def __call__(self):
        """Do the share. Asked by USR2, a job is queued again once its work is saved, as often as the site allows; after TERM it waits to be killed."""
        again = signal.getsignal(signal.SIGUSR2)  # submitit's: asks `checkpoint` and requeues
        interrupt.listen()
        if (times := int(os.environ.get("SLURM_RESTART_COUNT", 0))) > self.max_requeues:  # submitit counts those that it asked for, not lost nodes
            raise RuntimeError(f"queued again {times} times, the site allows max_requeues={self.max_requeues}: vhs retry {self.url} begins anew")
        run = reopen(self.url)
        run.only_scope = self.scope
        execution = run.config.execution.model_copy(update={"workers": 1})  # the job has the cores, memory and GPU of one unit, and a gang's machines too
        run.config = run.config.model_copy(update={"execution": execution})
        world.set_environment(run.config.threads)
        try:
            share.work(run, self.link, self.index, self.count, world.machines())
        except interrupt.Interrupted:
            # TERM alone: scancel, or the grace time of a preemption, after which SLURM queues again what it had to kill, and not what has ended by itself
            if interrupt.wait_for(signal.SIGUSR2, GRACE_S):
                if not shutil.which("scontrol"):
                    os._exit(AGAIN)
                again(signal.SIGUSR2, None)
            raise

    def checkpoint(self, *_):
        """What a job that is queued again does: the same, for the run knows how far it is."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(run: Run, cluster: str, until: str = ORDER[-1]) -> dict:
    """Hand what is missing of `run`, through stage `until`, to SLURM, as `cluster` (jobs/site.py) says -> the record that is kept in
    state/submissions: when_s, cluster, log (a folder), jobs [{id, link}]. RuntimeError where sbatch refuses; then nothing stays submitted."""
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    forget_allocation()
    site, jobs, after, chain = Site.load(cluster), [], [], links(run, until)
    stamp = f"{time.time_ns()}"  # a folder of its own: another cluster would give the same job numbers, and submitit take old results for new
    folder = run.storage.shared / "state" / "slurm" / stamp
    folder.mkdir(parents=True, mode=0o700)
    ill = sorted(history.ill_nodes(run))
    for name in run.under(failures.FOLDER):
        run.storage.delete(name)  # somebody starts it afresh: earlier tries do not count
    counts = {link.name: max(1, math.ceil(link.units / site.resources(link.stage).units_per_job)) for link in chain}
    for link in chain:
        resources = site.resources(link.stage)
        options = resources.sbatch(link.ranks)
        if ill:
            options["exclude"] = ",".join([*filter(None, [resources.exclude]), *ill])
        more = {**options.pop("additional_parameters", {}), **({"dependency": "afterany:" + ":".join(after)} if after else {}), "requeue": True}
        executor = SlurmExecutor(folder / link.name, max_num_timeout=site.max_requeues, python=site.command)
        executor.update_parameters(
            **options, job_name=f"vhs-{run.config.name}-{link.name}".replace("/", "-"), comment=run.storage.url, setup=site.lines,
            teardown=[TEARDOWN], srun_args=[f"--cpus-per-task={options['cpus_per_task']}", "--kill-on-bad-exit=0"], stderr_to_stdout=True,
            signal_delay_s=resources.signal_s, array_parallelism=resources.max_jobs, additional_parameters=more,
        )  # fmt: skip
        count = counts[link.name]
        work = [Job(run.storage.url, run.only_scope, link, n, count, site.max_requeues) for n in range(count)]
        after = []
        for start in range(0, count, site.max_array):
            try:
                with executor.batch():
                    submitted = [executor.submit(job) for job in work[start : start + site.max_array]]
            except FailedJobError as error:
                _cancel([job["id"] for job in jobs])
                raise RuntimeError(
                    f"sbatch refused the jobs of {link.name}, and those before are taken back: {error}. The chain has {sum(counts.values())} jobs, {count} of "
                    "them these: where a site allows fewer at a time, give its stages more `units_per_job`"
                ) from error
            jobs += [{"id": job.job_id, "link": link.name} for job in submitted]
            after.append(submitted[0].job_id.partition("_")[0])
    record = {"when_s": time.time(), "cluster": cluster, "log": str(folder), "jobs": jobs, "left_out": ill}
    run.storage.put(f"state/submissions/{stamp}.json", json.dumps(record, indent=1).encode())
    return record


def queued(run: Run) -> dict[str, str]:
    """Jobs of the run that SLURM still has, waiting or at work: id -> what squeue says of it (state, and the reason to wait). They are known by
    their comment, the run's address: numbers begin again with a new cluster."""
    said = scheduler.ask("squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i|%T|%k|%r")
    jobs = [line.split("|", 2) for line in said.splitlines()]
    mine = f"{run.storage.url}|"  # it may hold any character, and a reason to wait spaces
    return {job: f"{state} {rest.removeprefix(mine)}" for job, state, rest in jobs if rest.startswith(mine)}


def cancel(run: Run) -> int:
    """Take every job of the run from SLURM -> how many it had. What was at work saves first, where it trains."""
    waiting = sorted({job.partition("_")[0] for job in queued(run)})
    _cancel(waiting)
    return len(waiting)


def _cancel(ids: list[str]):
    if ids:
        scheduler.ask("scancel", *sorted({job.partition("_")[0] for job in ids}))

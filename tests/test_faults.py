"""Faults while a run is at work on a real SLURM, or on a Ray in it: nothing is lost, nothing is committed twice. Each says what it cost."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, until
from conftest import markers, vhs
from test_actors import ray_job, records
from test_chain import SITE, begin, job_of, jobs, on
from test_resume import assert_same

from jobs import claim, failures
from jobs.config import CONFIGS
from jobs.site import Site

INTERVAL = 25  # steps between checkpoints
LONG = ("dreambooth.steps=200", f"execution.checkpoint_steps={INTERVAL}", "execution.heartbeat_s=0.3", "execution.stale_s=4")
OTHERS = ("generation.seed=9", "execution.heartbeat_s=0.3", "execution.stale_s=4")


@pytest.fixture(scope="module")
def trained(reference, tmp_path_factory) -> Path:
    """What an undisturbed training makes."""
    run = begin(tmp_path_factory.mktemp("trained") / "run", reference, *LONG)
    vhs("stage", "dreambooth", run.url)
    return Path(run.url)


@pytest.fixture(scope="module")
def drawn(reference, tmp_path_factory) -> Path:
    """What undisturbed generation and labelling make."""
    run = begin(tmp_path_factory.mktemp("drawn") / "run", reference, *OTHERS)
    vhs("stage", "label", run.url)
    return Path(run.url)


def _step(run: Path) -> int:
    """The step that the run's one training says it is at, or 0."""
    beats = sorted((run / "state" / "claims").rglob("*.beat"))
    try:
        return json.loads(beats[-1].read_text()).get("step", 0) if beats else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def _preempt(cluster: Cluster, job: str):
    cluster.sbatch("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", script="true")


def _preempt_by_term(cluster: Cluster, job: str):
    """As SLURM does unless it is told to send a job's own signal: TERM, and KILL after the grace time."""
    file = cluster.folder / "etc" / "slurm.conf"
    told = file.read_text()
    assert "SlurmctldParameters=preempt_send_user_signal" in told
    file.write_text(told.replace("SlurmctldParameters=preempt_send_user_signal", ""))
    try:
        cluster.daemon("slurmctld", "off")
        cluster.daemon("slurmctld", "on")
        _preempt(cluster, job)
        until(lambda: cluster.job(job)["JobState"] != "RUNNING", "its grace time is over")
    finally:
        file.write_text(told)
        cluster.daemon("slurmctld", "off")
        cluster.daemon("slurmctld", "on")


def _limit(cluster: Cluster, job: str):
    cluster.run(["scontrol", "update", f"job={job}", "EndTime=now+35"])


def _requeue(cluster: Cluster, job: str):
    cluster.run(["scontrol", "requeue", job])


def _power_off(cluster: Cluster, job: str):
    node = cluster.job(job)["NodeList"]
    cluster.node(int(node.removeprefix("node")), "off")
    cluster.run(["scontrol", "update", f"node={node}", "state=down", "reason=power"])
    until(lambda: cluster.job(job)["JobState"] != "RUNNING", "SLURM has seen it")
    cluster.node(int(node.removeprefix("node")), "on")


CONTAINED = "in a container at its time limit"
TRAINING = {
    "preempted": _preempt, "preempted by TERM": _preempt_by_term, CONTAINED: _limit, "at its time limit": _limit, "requeued": _requeue,
    "its node without power": _power_off,
}  # fmt: skip


def _without_slurm(folder: Path) -> tuple[str, ...]:
    """A site whose Python has no command of SLURM's around it, as in a container."""
    site = yaml.safe_load((CONFIGS / "clusters" / "testcluster.yaml").read_text()) | {"python": f"env PATH=/nowhere {sys.executable}"}
    (folder / "contained.yaml").write_text(yaml.safe_dump(site))
    return "--on", "slurm", "--cluster", str(folder / "contained.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("what", TRAINING)
def test_a_training_loses_at_most_one_interval(what, cluster, reference, trained, tmp_path, figure):
    run = begin(tmp_path / "run", reference, *LONG)
    on(cluster, "stage", "dreambooth", run.url, *(_without_slurm(tmp_path) if what == CONTAINED else SITE), "--detach")
    job, folder = job_of(tmp_path / "run", "dreambooth"), Path(run.url)
    until(lambda: _step(folder) >= INTERVAL + 10, "a checkpoint, and steps after it")
    seen = [_step(folder)]
    TRAINING[what](cluster, job)

    def queued_again() -> bool:
        seen.append(_step(folder))
        return cluster.job(job)["Restarts"] == "1"

    until(queued_again, "the job is queued again")
    began, at = time.monotonic(), max(seen)
    saved = max((int(file.stem) for file in folder.glob("checkpoints/*/*.pt")), default=0)
    until(lambda: cluster.job(job)["JobState"] == "RUNNING" and saved < _step(folder) != at, "training again")
    recovered_s = time.monotonic() - began
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "the job's end", patience_s=400)
    assert 0 < saved < 200 and at - saved <= INTERVAL, f"{at - saved} steps were lost"
    figure(f"a training {what}: {recovered_s:.0f} s until it trains again, {max(0, at - saved)} steps done again, of 200")
    vhs("stage", "dreambooth", run.url)  # has nothing to do but the views for people
    assert_same(folder, trained, f"a training {what} at step {at}, going on from {saved}", figure)
    assert len(markers(folder)) == len(markers(trained))


def _requeue_twice(cluster: Cluster, run: Path) -> str:
    task = f"{job_of(run, 'generate-0')}_1"
    for _ in range(2):
        until(lambda: cluster.job(task)["JobState"] == "RUNNING", "an array task at work")
        cluster.run(["scontrol", "requeue", task])
        until(lambda: cluster.job(task)["JobState"] == "PENDING", "it waits")  # ten seconds: on the node its credential is still revoked
    return "an array task requeued twice"


def _no_controller(cluster: Cluster, run: Path) -> str:
    cluster.daemon("slurmctld", "off")
    time.sleep(5)
    cluster.daemon("slurmctld", "on")
    return "slurmctld restarted"


def _no_accounting(cluster: Cluster, run: Path) -> str:
    cluster.daemon("slurmdbd", "off")
    time.sleep(60)
    status = on(cluster, "status", run)
    cluster.daemon("slurmdbd", "on")
    assert "generate" in status
    return "no sacct for a minute"


@pytest.mark.slow
@pytest.mark.parametrize("fault", [_no_controller, _requeue_twice, _no_accounting])
def test_generation_goes_on(fault: Callable[[Cluster, Path], str], cluster, reference, drawn, tmp_path, figure):
    run = begin(tmp_path / "run", reference, *OTHERS)
    folder, total = Path(run.url), len(markers(drawn))
    on(cluster, "stage", "label", run.url, *SITE, "--detach")
    job = job_of(folder, "generate-0")
    until(lambda: cluster.job(f"{job}_1")["JobState"] == "RUNNING", "generation at work")
    done = len(markers(folder))
    what = fault(cluster, folder)
    began = time.monotonic()
    until(lambda: len(markers(folder)) > done, "the next unit")
    recovered_s = time.monotonic() - began
    until(lambda: len(markers(folder)) == total and not cluster.run(["squeue", "--noheader"]).strip(), "the run's end", patience_s=400)
    assert done < total
    vhs("stage", "label", run.url)
    figure(f"{what}: {recovered_s:.0f} s until the next unit was committed")
    assert_same(folder, drawn, f"{what}, with {done} of {total} units done", figure)
    units = [record["unit"] for record in records(folder)]
    assert units and len(units) == len(set(units)), "a unit was committed twice"


NODES_OWN = {  # what is planted in the site's file -> what status says
    "memory": ({"stages": {"dreambooth": {"mem_gb_per_rank": 0.4}}}, "out of memory"),
    "module": ({"setup": ["export PYTHONPATH={planted}:$PYTHONPATH"]}, "No module named 'diffusers'"),
    "disk": ({"setup": ["mkdir -p {disk}; mount -t tmpfs -o size=64k full {disk}"], "work_dir": "{disk}"}, "No space left on device"),
}
WAYS = ["memory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("module", "disk"))]


@pytest.mark.parametrize("way", WAYS)
def test_a_failing_unit_is_shown_with_cause_node_and_what_to_do(way, cluster, reference, tmp_path):
    """Killed for its memory, a module that is not on the node, a full disk there. (An exception: test_chain.)"""
    planted, said = NODES_OWN[way]
    (tmp_path / "planted" / "diffusers").mkdir(parents=True)
    (tmp_path / "planted" / "diffusers" / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'diffusers'\", name='diffusers')\n")
    text = json.dumps({**Site.load("testcluster").model_dump(mode="json"), **planted, "options": {"nodelist": "node2"}})
    site = tmp_path / "site.yaml"
    site.write_text(text.replace("{planted}", f"{tmp_path}/planted").replace("{disk}", f"{tmp_path}/disk"))
    run = begin(tmp_path / "run", reference, "dreambooth.learning_rate=2e-4")
    on(cluster, "stage", "dreambooth", run.url, "--on", "slurm", "--cluster", site, "--detach")
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "the job's end")

    def shown() -> str | None:
        text = on(cluster, "status", run.url, environment={"COLUMNS": "250"})
        return text if said in text.partition("what failed")[2] else None

    text = until(shown, f"status says {said}").partition("what failed")[2]
    row = next(line for line in text.splitlines() if said in line)
    assert "node2" in row and f"vhs retry {run.url} generator/split" in row


@pytest.mark.slow
def test_a_unit_that_kills_its_jobs_is_given_up_after_so_many_tries(cluster, reference, tmp_path, figure):
    """Every job of the chain has too little memory for it: the first three die of it, the others leave it alone."""
    site = tmp_path / "site.yaml"
    site.write_text(json.dumps({**Site.load("testcluster").model_dump(mode="json"), "mem_gb_per_rank": 0.4}))
    run = begin(tmp_path / "run", reference, "dreambooth.learning_rate=2e-4", "execution.stale_s=4", "execution.heartbeat_s=0.5")
    on(cluster, "stage", "label", run.url, "--on", "slurm", "--cluster", site, "--detach")
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "the chain's end", patience_s=400)
    run.refresh()
    (failure,) = [failures.read(run.storage, Path(name).stem) for name in run.under("state/failures/")]
    tries = claim.attempts(run.storage, failure.identity)
    figure(f"{len(jobs(Path(run.url)))} jobs, {len(tries)} tries: {[one.cause for one in tries]}")
    assert [one.cause for one in tries] == ["out of memory"] * run.config.execution.tries and failure.tries == len(tries)
    assert f"{failure.tries} of {failure.tries}" in on(cluster, "status", run.url, environment={"COLUMNS": "250"})


def _processes(pattern: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") if entry.name.isdecimal() else ""
        except OSError:
            continue
        if re.search(pattern, line):
            found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_ray_loses_a_worker_and_a_node(cluster, reference, drawn, tmp_path, figure):
    """An actor's process is killed at its unit, then the raylet of a node that is not the head's."""
    run = begin(tmp_path / "run", reference, *OTHERS)
    folder, total = Path(run.url), len(markers(drawn))
    job = ray_job(cluster, tmp_path, "stage", "label", run.url)
    worker = until(lambda: _processes(r"^ray::Worker\.attempt"), "an actor at work", patience_s=240)[0]
    before = len(markers(folder))
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(markers(folder)) > before, "the next unit")
    figure(f"a Ray worker killed: {time.monotonic() - killed:.0f} s until the next unit was committed")
    raylet = until(lambda: _processes(rf"raylet/raylet .*/tmp/vhs-ray-{job}\.[12]"), "a raylet that is not the head's")[0]
    before = len(markers(folder))
    assert before < total
    os.kill(raylet, signal.SIGKILL)
    killed = time.monotonic()
    until(lambda: len(markers(folder)) > before, "the next unit", patience_s=240)
    figure(f"a raylet killed: {time.monotonic() - killed:.0f} s until the next unit was committed")
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "Ray's end", patience_s=400)
    vhs("stage", "label", run.url)
    assert_same(folder, drawn, f"a worker and a raylet lost, {before} of {total} units done at the second", figure)
    units = [record["unit"] for record in records(folder)]
    assert units and len(units) == len(set(units)), "a unit was committed twice"

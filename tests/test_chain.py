"""A run as a chain of job arrays on a real SLURM: the same bytes as on this machine, whatever happens to its jobs and nodes."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from cluster import until
from conftest import ROOT, committed, markers, vhs
from test_resume import assert_same

from jobs import chain, config, plan
from jobs.share import Link

SITE = ("--on", "slurm", "--cluster", "testcluster")


def begin(out, reference, *overrides) -> plan.Run:
    """A debug run with `overrides`, which has taken over from `reference` what they do not touch."""
    run = plan.start(config.load("debug/demo", list(overrides)), str(out))
    plan.adopt_all(run, str(reference))
    return run


def on(cluster, *arguments, environment: dict[str, str] | None = None, **options) -> str:
    """`vhs ARGUMENTS` where SLURM's commands speak to the cluster -> what it printed."""
    return vhs(*arguments, environment={**cluster.environment, "PYTHONPATH": str(ROOT), **(environment or {})}, **options)


def jobs(run) -> list[dict]:
    """What was submitted for the run: [{id, link}]."""
    return [job for file in sorted((run / "state" / "submissions").iterdir()) for job in json.loads(file.read_text())["jobs"]]


def job_of(run, link: str) -> str:
    return next(job["id"].partition("_")[0] for job in jobs(run) if job["link"] == link)


def ended(cluster, run) -> list[dict]:
    """Accounting's word on every job of the run, once it has none unfinished: it lags by seconds."""
    ids = ",".join(sorted({job["id"].partition("_")[0] for job in jobs(run)}))

    def rows():
        found = cluster.sacct(ids)
        return found if found and not {row["State"] for row in found} & {"PENDING", "RUNNING", "REQUEUED"} else None

    return until(rows, "accounting knows the end of every job")


def test_a_chain_names_what_is_missing(reference, tmp_path):
    fresh = plan.start(config.load("debug/demo", ["dreambooth.ranks=4"]), str(tmp_path / "fresh"))
    names = [link.name for link in chain.links(fresh)]
    assert names == ["ingest", "split", "labeller", "priors", "dreambooth", "generate-0", "label-0", "generate-1", "label-1", "train", "evaluate", "report"]
    later = begin(tmp_path / "later", reference, "dreambooth.ranks=4")
    assert chain.links(later)[:2] == [Link("dreambooth", 0, 1, 4), Link("generate", 0, 3, 1)]
    assert [link.stage for link in chain.links(later, "generate")][-1] == "label" and chain.links(plan.reopen(str(reference))) == []


def test_a_run_on_slurm_is_the_local_one(cluster, reference, tmp_path, figure):
    run = tmp_path / "run"
    printed = on(cluster, "run", "debug/demo", "--out", run, *SITE)
    assert_same(run, reference, "SLURM", figure)
    rows = ended(cluster, run)
    assert {row["State"] for row in rows} == {"COMPLETED"}, rows
    arrays = Counter(row["JobID"].partition("_")[0] for row in rows if "_" in row["JobID"])
    figure(f"{len(rows)} jobs, {len(arrays)} of them arrays of {sorted(arrays.values())}")
    assert max(arrays.values()) >= 3 and "report:" in printed
    assert not cluster.run(["squeue", "--noheader"]).strip()
    assert "0 units" not in on(cluster, "run", "debug/demo", "--out", run, *SITE) and len(jobs(run)) == len(rows), "a finished run submits nothing"


def test_four_ranks_on_two_nodes_are_four_ranks_here(cluster, reference, tmp_path, figure):
    """DreamBooth by DDP: two nodes, on each an agent that starts two ranks."""
    there, here = (begin(tmp_path / name, reference, "dreambooth.ranks=4", "dreambooth.steps=3") for name in ("there", "here"))
    on(cluster, "stage", "dreambooth", there.url, *SITE)
    vhs("stage", "dreambooth", here.url)
    assert_same(tmp_path / "there", tmp_path / "here", "2 nodes x 2 ranks", figure)
    (row,) = ended(cluster, tmp_path / "there")
    assert "," in row["NodeList"] or "-" in row["NodeList"], f"ran on one node: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_asked_to_stop_a_training_saves_is_queued_again_and_ends_the_same(ranks, cluster, reference, tmp_path, figure):
    """USR2 is what SLURM sends before a time limit or a preemption. No checkpoint but the one it asks for."""
    longer = ("dreambooth.steps=120", f"dreambooth.ranks={ranks}", "execution.checkpoint_steps=100000", "execution.heartbeat_s=0.3")
    there, here = (begin(tmp_path / name, reference, *longer) for name in ("there", "here"))
    on(cluster, "stage", "dreambooth", there.url, *SITE, "--detach")
    job = job_of(tmp_path / "there", "dreambooth")
    until(lambda: any((json.loads(file.read_text()).get("step") or 0) >= 5 for file in tmp_path.glob("there/state/claims/*.beat")), "five steps")
    cluster.run(["scancel", "--signal=USR2", job])
    (saved,) = until(lambda: list(tmp_path.glob("there/checkpoints/*/*.pt")), "a checkpoint")
    step = int(saved.stem)
    assert 5 <= step < 120
    until(lambda: cluster.job(job)["Restarts"] == "1", "queued again")
    cluster.run(["scontrol", "update", f"job={job}", "StartTime=now"])
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "the job's end")
    for run in (there, here):  # there, nothing is left but the views for people
        vhs("stage", "dreambooth", run.url)
    assert_same(tmp_path / "there", tmp_path / "here", f"{ranks} ranks, asked to stop at step {step} of 120", figure)


def test_a_unit_that_fails_is_named_with_its_node_and_what_to_do(cluster, reference, tmp_path):
    run = begin(tmp_path / "run", reference, "dreambooth.learning_rate=1e9")
    said = on(cluster, "stage", "dreambooth", run.url, *SITE, code=1)
    assert "no longer a number" in said and "1 units failed" in said
    said = on(cluster, "status", run.url, environment={"COLUMNS": "250"})
    assert "FloatingPointError" in said and "node" in said and f"vhs retry {run.url} generator/split" in said
    assert "SLURM: no job" in said
    said = on(cluster, "logs", run.url, "generator")
    assert "Traceback" in said and "submitit" in said, "the traceback, and the job's log"
    assert "no unit that failed" in on(cluster, "retry", run.url, "generated", code=1)
    assert "jobs in" in on(cluster, "retry", run.url, "generator/split")
    on(cluster, "cancel", run.url)
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "nothing left running")


def test_jobs_that_wait_for_nodes_are_seen_and_taken_back(cluster, reference, tmp_path):
    """SLURM says in a sentence why: "Nodes required for job are DOWN, DRAINED or …"."""
    run = begin(tmp_path / "run with spaces", reference, "dreambooth.seed=9")
    every = cluster.run(["sinfo", "--noheader", "--format", "%N"]).split()[0]
    cluster.run(["scontrol", "update", f"node={every}", "state=drain", "reason=maintenance"])
    try:
        on(cluster, "stage", "dreambooth", run.url, *SITE, "--detach")
        job = job_of(tmp_path / "run with spaces", "dreambooth")
        reason = until(lambda: (said := cluster.job(job)["Reason"]) not in ("None", "Priority") and said, "a reason to wait")
        shown = until(lambda: [line for line in cluster.run(["squeue", "-h", "-o", "%i %r"]).splitlines() if line.startswith(job)], "it in the queue")
        said = on(cluster, "status", run.url, environment={"COLUMNS": "250"})
        assert "PENDING" in said and "no job" not in said, (said, reason, shown)
        on(cluster, "cancel", run.url)
        assert not cluster.run(["squeue", "--noheader"]).strip(), (reason, shown)
    finally:
        cluster.run(["scontrol", "update", f"node={every}", "state=resume"])


@pytest.mark.slow
def test_nodes_and_jobs_are_lost_and_nothing_else(cluster, reference, tmp_path, figure):
    """While a detached run goes: a task requeued, another killed, a node without power. Every unit is committed once, with the same bytes."""
    run, total = tmp_path / "run", len(markers(reference))
    on(cluster, "run", "debug/demo", "--out", run, *SITE, "--detach")
    first, generating = job_of(run, "priors"), job_of(run, "generate-0")
    until(lambda: cluster.job(f"{first}_1")["JobState"] == "RUNNING", "priors at work")
    cluster.run(["scontrol", "requeue", f"{first}_1"])
    until(lambda: cluster.job(f"{generating}_1")["JobState"] == "RUNNING", "generation at work")
    cluster.run(["scancel", "--signal=KILL", f"{generating}_2"])
    node = cluster.job(f"{generating}_1")["NodeList"]
    cluster.node(int(node.removeprefix("node")), "off")
    done = len(markers(run))
    assert done < total
    cluster.run(["scontrol", "update", f"node={node}", "state=down", "reason=power"])
    until(lambda: cluster.job(f"{generating}_1")["JobState"] != "RUNNING", "SLURM has seen it")
    cluster.node(int(node.removeprefix("node")), "on")
    until(lambda: len(markers(run)) == total and not cluster.run(["squeue", "--noheader"]).strip(), "the run's end", patience_s=400)
    vhs("run", "debug/demo", "--out", run)
    assert_same(run, reference, f"{node} lost with {done} of {total} units done, one job requeued, one killed", figure)
    records = [json.loads(file.read_text()) for file in (run / "state" / "done").iterdir()]
    assert len(records) == total, "a unit was committed twice, or by nobody"
    assert len(committed(run)) > 0

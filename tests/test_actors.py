"""A run on Ray clusters that slurm/ray.sbatch brings up on three nodes of a real SLURM, alone and between other backends."""

from __future__ import annotations

import json

import pytest
from cluster import until
from conftest import ROOT, markers, vhs
from test_chain import begin, job_of, on
from test_resume import assert_same
from test_slurm_scripts import SITE, submit


def records(run) -> list[dict]:
    return [json.loads(file.read_text()) for file in (run / "state" / "done").iterdir()]


def ray_job(cluster, folder, *arguments) -> str:
    """Submit `vhs ARGUMENTS --on ray` on a Ray of three nodes -> the job's id."""
    line = f'eval "$(python -m jobs.cli cluster-env {SITE} --stage generate)"; sbatch --parsable --output={folder}/ray.log $VHS_SBATCH --nodes=3 '
    line += f'"$VHS_SLURM/ray.sbatch" vhs {" ".join(map(str, arguments))} --on ray'
    return cluster.run(["env", f"PYTHONPATH={ROOT}", "bash", "-euc", line], cwd=folder).strip()


@pytest.mark.slow
def test_a_run_on_ray_is_the_local_one(cluster, reference, tmp_path, figure):
    submit(cluster, tmp_path, "ray.sbatch", "vhs", "run", "debug/demo", "--out", str(tmp_path / "run"), "--on", "ray", stage="generate", options="--nodes=3")
    assert_same(tmp_path / "run", reference, "Ray on three nodes", figure)
    nodes = {record["machine"] for record in records(tmp_path / "run")}
    assert len(nodes) == 3, nodes


@pytest.mark.slow
def test_four_ranks_on_two_ray_nodes_are_four_ranks_here(cluster, reference, tmp_path, figure):
    there, here = (begin(tmp_path / name, reference, "dreambooth.ranks=4", "dreambooth.sharding=zero2") for name in ("there", "here"))
    submit(cluster, tmp_path, "ray.sbatch", "vhs", "stage", "dreambooth", there.url, "--on", "ray", stage="generate", options="--nodes=3")
    vhs("stage", "dreambooth", here.url)
    assert_same(tmp_path / "there", tmp_path / "here", "ZeRO-2, 2 Ray nodes x 2 ranks", figure)


def test_begun_on_slurm_continued_on_ray_finished_here(cluster, reference, tmp_path, figure):
    """Each is cancelled half way. The bytes are those of an undisturbed run, no unit is done twice."""
    run, total = tmp_path / "run", len(markers(reference))
    on(cluster, "run", "debug/demo", "--out", run, "--on", "slurm", "--cluster", SITE, "--detach")
    until(lambda: (run / "labeller").is_dir() and cluster.job(f"{job_of(run, 'priors')}_0")["JobState"] == "RUNNING", "priors at work")
    on(cluster, "cancel", run)
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "nothing left running")
    by_slurm = len(markers(run))
    job = ray_job(cluster, tmp_path, "run", "debug/demo", "--out", run)
    until(lambda: list(run.glob("generated/split/*/*.parquet")), "a generated shard", patience_s=240)
    cluster.run(["scancel", job])
    until(lambda: not cluster.run(["squeue", "--noheader"]).strip(), "Ray's end")
    by_ray = len(markers(run)) - by_slurm
    vhs("run", "debug/demo", "execution.stale_s=3", "--out", run)
    assert_same(run, reference, f"{by_slurm} units by SLURM, {by_ray} by Ray, {total - by_slurm - by_ray} here", figure)
    assert 0 < by_slurm < by_slurm + by_ray < total == len(records(run))

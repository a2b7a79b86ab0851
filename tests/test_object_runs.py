"""A whole run in object storage, on a real S3 server: the same bytes as on this machine's disk, killed and resumed too."""

from __future__ import annotations

import json
import signal

import pytest
from conftest import markers, vhs
from test_chain import SITE, on
from test_resume import assert_same
from test_slurm_scripts import submit

from shards.storage import open_storage


def done_once(url: str):
    """Every unit was committed by one attempt."""
    storage = open_storage(url)
    units = [json.loads(storage.read(name))["unit"] for name in storage.list("state/done/")]
    assert len(units) == len(set(units)) == len(markers(url))


@pytest.mark.parametrize("kills", [("tar-before-sidecar:4",), pytest.param(("tar-before-sidecar:2", "checkpoint-half-written:2"), marks=pytest.mark.slow)])
def test_a_run_killed_on_s3_is_the_local_one(kills, bucket, reference, figure):
    """Between a tar and its sidecar, and in a training: the windows that leave something."""
    total, left = len(markers(reference)), []
    for where in kills:
        vhs("run", "debug/demo", "--out", bucket, environment={"VHS_CRASH_AT": where}, code=-signal.SIGKILL)
        left.append(total - len(markers(bucket)))
    assert all(left), "nothing was left to do"
    assert f"report: {bucket}/report/index.html" in vhs("run", "debug/demo", "--out", bucket)
    assert_same(bucket, reference, f"S3, killed with {left} of {total} units left", figure)
    done_once(bucket)
    printed = vhs("run", "debug/demo", "--out", bucket)
    assert "units to do" not in printed and str(total) in vhs("status", bucket)
    assert " 0 errors" in vhs("verify", bucket, "--full")


@pytest.mark.slow
def test_a_run_on_slurm_to_s3_is_the_local_one(cluster, bucket, reference, tmp_path, figure):
    shared = {"VHS_SHARED_DIR": str(tmp_path / "shared")}
    on(cluster, "run", "debug/demo", "--out", bucket, *SITE, environment=shared)
    assert_same(bucket, reference, "SLURM to S3", figure)
    done_once(bucket)


@pytest.mark.slow
def test_a_run_on_ray_to_s3_is_the_local_one(cluster, s3, bucket, reference, tmp_path, figure, monkeypatch):
    monkeypatch.setattr(cluster, "environment", cluster.environment | s3)
    submit(cluster, tmp_path, "ray.sbatch", "vhs", "run", "debug/demo", "--out", bucket, "--on", "ray", stage="generate", options="--nodes=3")
    assert_same(bucket, reference, "Ray on three nodes to S3", figure)
    done_once(bucket)

"""A run on Ray clusters that slurm/ray.sbatch brings up on three nodes of a real SLURM, alone and between other backends."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from cluster import until
from conftest import ROOT, markers, vhs
from test_chain import begin, job_of, on
from test_resume import assert_same
from test_slurm_scripts import SITE, submit

from jobs import claim, config, plan


def records(run) -> list[dict]:
    return [json.loads(file.read_text()) for file in (run / "state" / "done").iterdir()]


def ray_job(cluster, folder, *arguments) -> str:
    """Submit `vhs ARGUMENTS --on ray` on a Ray of three nodes -> the job's id."""
    line = f'eval "$(python -m jobs.cli cluster-env {SITE} --stage generate)"; sbatch --parsable --output={folder}/ray.log $VHS_SBATCH --nodes=3 '
    line += f'"$VHS_SLURM/ray.sbatch" vhs {" ".join(map(str, arguments))} --on ray'
    return cluster.run(["env", f"PYTHONPATH={ROOT}", "bash", "-euc", line], cwd=folder).strip()


@contextmanager
def ray_here(tmp_path, head: list[str], *others: list[str], cloud: dict | None = None) -> Iterator[dict[str, str]]:
    """Ray's own processes on this machine, each with options of its own -> what a driver needs in its environment. `cloud`: the types of node that
    Ray's autoscaler may bring, by its provider for one machine."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    with closing(socket.socket()) as one, tempfile.TemporaryDirectory(prefix="vhs-ray-") as short:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": address, "RAY_TMPDIR": short}
    common = ["--node-ip-address=127.0.0.1", "--disable-usage-stats", f"--object-store-memory={100 << 20}"]
    environment = {**os.environ, **known, "PYTHONPATH": str(ROOT), "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    ray = [str(Path(sys.executable).parent / "ray"), "start"]
    head = [*head, "--head", f"--port={address.partition(':')[2]}", f"--temp-dir={short}", "--include-dashboard=false"]
    if cloud:
        head_type = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
        config = {
            "cluster_name": "here", "max_workers": 8, "upscaling_speed": 1.0, "idle_timeout_minutes": 1, "auth": {}, "head_node_type": "ray.head.default",
            "provider": {"type": "fake_multinode", "gcs_address": address, "disable_node_updaters": True, "disable_launch_config_check": True},
            "available_node_types": {"ray.head.default": head_type, **cloud},
            **dict.fromkeys(("docker", "file_mounts"), {}), **dict.fromkeys(("cluster_synced_files", "rsync_exclude", "rsync_filter"), []),
            **{f"{when}_commands": [] for when in "initialization setup head_setup worker_setup head_start_ray worker_start_ray".split()},
            "file_mounts_sync_continuously": False,
        }  # fmt: skip
        (tmp_path / "cloud.json").write_text(json.dumps(config))
        head.append(f"--autoscaling-config={tmp_path / 'cloud.json'}")
    try:
        for where in (head, *([f"--address={address}", *other] for other in others)):
            subprocess.run([*ray, *where, *common], env={**environment, "RAY_ADDRESS": ""}, check=True, capture_output=True, timeout=120)
        yield known | {"PYTHONPATH": str(ROOT)}
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(short in word for word in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(short, ignore_errors=True)


def test_actors_that_ray_has_no_room_for_hold_nothing_up(tmp_path):
    """Twice three cores are two actors of two cores each. And a unit has the claim of a machine that is gone, as that of a former driver's actor."""
    run = plan.start(config.load("debug/demo", ["threads=2", "ingest.shard_images=8", "execution.stale_s=2"]), str(tmp_path / "run"))
    units = run.units("ingest")
    lost = f"{claim.FOLDER}{units[3].identity}-0000.json"
    run.storage.commit(lost, json.dumps({**claim.owner(), "machine": "elsewhere"}).encode())
    with ray_here(tmp_path, ["--num-cpus=3"], ["--num-cpus=3"]) as environment:
        vhs("stage", "ingest", run.url, "--on", "ray", environment=environment)
    run.refresh()
    assert len(units) > 3 and all(run.done(unit) for unit in units)
    assert claim.read(run.storage, lost).cause == "killed: its heart stood still"


@pytest.mark.slow
def test_an_autoscaler_brings_the_nodes_that_there_is_work_for(reference, tmp_path):
    """A head that takes no work, and up to three workers of one core: Ray's own autoscaler, over nodes on this machine."""
    worker = {"resources": {"CPU": 1, "object_store_memory": 100 << 20}, "node_config": {}, "min_workers": 0, "max_workers": 3}
    run = begin(tmp_path / "run", reference, "generation.seed=9", "generation.unit_images=2", "generation.round_units=4")
    with ray_here(tmp_path, ["--num-cpus=0"], cloud={"worker": worker}) as environment:
        vhs("stage", "generate", run.url, "--on", "ray", environment=environment)
        brought = set(re.findall(r"f+0000\d: worker", (Path(environment["RAY_TMPDIR"]) / "session_latest" / "logs" / "monitor.log").read_text()))
    assert len(brought) == 3, "for 12 units"


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

"""What `sbatch` runs, on the real SLURM of slurm/testcluster."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, vhs
from test_chain import begin
from test_resume import assert_same

from jobs.site import Site

SITE = "testcluster"
THREE_NODES = """
import json, os, socket, stat, subprocess, sys, time
import ray

if "refused" in sys.argv:
    ray.init(log_to_driver=False)
    sys.exit("was let in")
ray.init(log_to_driver=False)

@ray.remote(scheduling_strategy="SPREAD")
def where():
    time.sleep(1)
    return socket.gethostname()

token = os.environ["RAY_AUTH_TOKEN_PATH"]
wrong = token + ".wrong"
with open(wrong, "w") as file:
    file.write("0" * len(open(token).read()))
again = {**os.environ, "RAY_AUTH_TOKEN_PATH": wrong}
refused = subprocess.run([sys.executable, sys.argv[0], "refused"], env=again, capture_output=True, text=True)
print(json.dumps({
    "hosts": sorted(set(ray.get([where.remote() for _ in range(9)]))),
    "modes": [oct(stat.S_IMODE(os.stat(file).st_mode)) for file in (token, token.replace(".token", ".env"))],
    "refused": refused.stderr.strip().splitlines()[-1],
}))
"""

SUBMITS = """
import os, sys
import submitit
from jobs.site import Site, forget_allocation

forget_allocation()
site = Site.load(sys.argv[1])
executor = submitit.SlurmExecutor(sys.argv[2], python=site.command)
executor.update_parameters(**site.resources("train").sbatch(2 * site.resources("train").ranks_per_node), setup=site.lines)
names = ("SLURM_NODEID", "SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_PER_TASK", "SLURM_NNODES")
for task in executor.submit(lambda: [os.environ.get(name, "") for name in names]).results():
    print("task", *(value or "-" for value in task))
"""


def submit(cluster, folder: Path, script: str, *arguments: str, site: str = SITE, stage: str = "label", options: str = "", code: int = 0) -> str:
    """`sbatch --wait slurm/SCRIPT ARGUMENTS` from `folder`, which the nodes share -> what the job printed."""
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT)}
    exports = [sys.executable, "-m", "jobs.cli", "cluster-env", site, "--stage", stage]
    line = f'sbatch --wait --parsable --output=said.log $VHS_SBATCH {options} "$VHS_SLURM/{script}" {shlex.join(arguments)}'
    done = subprocess.run(
        ["bash", "-euc", f'eval "$({shlex.join(exports)})"\n{line}'], cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    said = (folder / "said.log").read_text() if (folder / "said.log").exists() else ""
    assert done.returncode == code, done.stderr + said
    return said


@pytest.mark.slow
def test_the_whole_run_by_one_script(cluster, reference, tmp_path, figure):
    said = submit(cluster, tmp_path, "pipeline.sbatch", "debug/demo", "--out", str(tmp_path / "run"), stage="driver")
    assert_same(tmp_path / "run", reference, "pipeline.sbatch", figure)
    assert "report:" in said


@pytest.mark.slow
def test_one_stage_by_srun(cluster, reference, tmp_path, figure):
    """Three units of class images, six tasks on three nodes that know nothing of each other."""
    run = begin(tmp_path / "run", reference, "priors.seed=5")
    here = begin(tmp_path / "here", reference, "priors.seed=5")
    submit(cluster, tmp_path, "stage.sbatch", "priors", str(tmp_path / "run"), stage="priors", options="--nodes=3")
    for each in (run, here):
        vhs("stage", "priors", each.url)
    assert_same(tmp_path / "run", tmp_path / "here", "stage.sbatch", figure)
    by = {json.loads(file.read_text())["machine"] for file in (tmp_path / "run" / "state" / "done").iterdir()}
    figure(f"class images were drawn on {len(by)} nodes")
    assert len(by) > 1


def test_ray_has_three_nodes_and_lets_nobody_else_in(cluster, tmp_path):
    (tmp_path / "three.py").write_text(THREE_NODES)
    said = submit(cluster, tmp_path, "ray.sbatch", "python", "three.py", options="--nodes=3")
    found = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert len(found["hosts"]) == 3 and f"Ray has 3 nodes: {', '.join(found['hosts'])}" in said
    assert found["modes"] == ["0o600", "0o600"] and "Failed to connect" in found["refused"]
    left = [file.name for file in tmp_path.iterdir() if file.suffix in (".env", ".token")]
    assert not left, "the keys go with the cluster"


def test_ray_says_what_is_wrong_and_hands_on_how_the_command_ended(cluster, tmp_path):
    submit(cluster, tmp_path, "ray.sbatch", "python", "-c", "raise SystemExit(7)", code=7)
    (tmp_path / "no_ray").write_text(f'#!/bin/sh\ncase "$*" in *ray.scripts*) echo no Ray here; exit 3;; esac\nexec {sys.executable} "$@"\n')
    (tmp_path / "no_ray").chmod(0o755)
    site = tmp_path / "site.yaml"
    site.write_text(yaml.safe_dump({**Site.load(SITE).model_dump(mode="json"), "python": str(tmp_path / "no_ray")}))
    said = submit(cluster, tmp_path, "ray.sbatch", "python", "-c", "print('never')", site=str(site), code=1)
    reason, _, log = said.strip().rpartition(" ")
    assert "ended before it listened" in reason and "never" not in said and "no Ray here" in Path(log).read_text()


def test_every_task_of_a_stage_has_its_share(cluster, tmp_path):
    """A stand-in for Python says what it was asked: the share of every task on two nodes, in an environment made by the site's lines."""
    (tmp_path / "say").write_text('#!/bin/sh\necho "asked $SET_UP $HF_HUB_OFFLINE $*"\n')
    (tmp_path / "say").chmod(0o755)
    loaded = Site.load(SITE)
    changed = {"python": str(tmp_path / "say"), "setup": ["export SET_UP='by the site'"], "network": False}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump({**loaded.model_dump(mode="json"), **changed}))
    said = submit(cluster, tmp_path, "stage.sbatch", "label", "my runs/x", site=str(tmp_path / "site.yaml"), options="--nodes=2")
    tasks = 2 * loaded.resources("label").ranks_per_node
    asked = sorted(line.partition("asked ")[2] for line in said.splitlines() if "asked" in line)
    assert asked == sorted(f"by the site 1 -P -m jobs.cli stage label my runs/x --share {task}/{tasks}" for task in range(tasks))


def test_a_job_submitted_from_a_job_gets_what_it_asks_for(cluster, tmp_path):
    """And not what its parent had: srun refuses to start where both kinds of SLURM_MEM_PER_* have come together."""
    (tmp_path / "submits.py").write_text(SUBMITS)
    wrap = shlex.join([sys.executable, "submits.py", SITE, str(tmp_path / "jobs")])
    line = ["sbatch", "--wait", "--output=said.log", "--ntasks=1", "--mem-per-cpu=900", f"--wrap={wrap}"]
    environment = {**cluster.environment, "PYTHONPATH": str(ROOT), "SBATCH_TIMELIMIT": "5"}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    said = (tmp_path / "said.log").read_text()
    train = Site.load(SITE).resources("train")
    asked = train.sbatch(2 * train.ranks_per_node)
    expected = [f"task {node} {asked['mem'].removesuffix('M')} - {asked['cpus_per_task']} 2" for node in (0, 1)]
    assert done.returncode == 0 and [row for row in said.splitlines() if row.startswith("task")] == expected, said

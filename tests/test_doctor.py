"""`vhs doctor` on a real SLURM: a good place has no problem, and each planted one is named by its check."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import vhs
from hypothesis import given
from hypothesis import strategies as st
from test_chain import on
from test_slurm_scripts import submit

from jobs.doctor import CHECKS
from jobs.scheduler import minutes
from jobs.site import Site

PLANTED = {  # check -> what is wrong in the site's file, and a word of what is said
    "partition": ({"partition": "nosuch"}, "main"),
    "accepted": ({"options": {"licenses": "unheard:1"}}, "refuses"),
    "time": ({"partition": "small", "time_min": 60}, "allows 2"),
    "size": ({"mem_gb_per_rank": 900}, "a node has"),
    "gpus": ({"gpus_per_node": 4, "gpu_type": "a100"}, "a100"),
    "arrays": ({"max_array": 5000}, "MaxArraySize 1001"),
    "python": ({"python": "/no/such/python"}, "without a word"),
    "modules": ({"setup": ["export PYTHONPATH="], "python": "python3 -S"}, "not on node"),
    "folder": ({"setup": ["mount -t tmpfs none {out}"]}, "hard links"),
    "scratch": ({"work_dir": "$NO_SUCH_VARIABLE"}, "no such variable"),
    "network": ({"network": True}, "does not reach"),
    "limits": ({"setup": ["ulimit -n 64"]}, "64 open files"),
}


def examine(cluster, folder, changes: dict, *arguments, code: int) -> str:
    """What doctor says of the test cluster's site with `changes`."""
    site, out = folder / "site.yaml", folder / "out"
    out.mkdir(exist_ok=True)
    text = json.dumps({**Site.load("testcluster").model_dump(mode="json"), **changes})
    site.write_text(text.replace("{out}", str(out)))
    return on(cluster, "doctor", "--cluster", site, "--out", out, *arguments, environment={"COLUMNS": "250"}, code=code)


def test_a_good_place_has_no_problem(cluster, tmp_path):
    said = examine(cluster, tmp_path, {}, "debug/demo", code=0)
    rows = [line.split() for line in said.splitlines() if " ok " in line]
    assert len(rows) == len(CHECKS["slurm"]) and "problem" not in said and "could not tell" not in said
    assert not list((tmp_path / "out").iterdir()), "it leaves nothing behind"


@pytest.mark.parametrize("check", PLANTED)
def test_each_planted_problem_is_named(check, cluster, tmp_path):
    changes, word = PLANTED[check]
    said = examine(cluster, tmp_path, changes, "--check", check, code=1)
    assert "problem" in said and word in said, said


def test_without_accounting_it_says_that_it_cannot_tell(cluster, tmp_path):
    cluster.daemon("slurmdbd", "off")
    try:
        assert "could not tell" in examine(cluster, tmp_path, {}, "--check", "accounting", code=1)
    finally:
        cluster.daemon("slurmdbd", "on")


def test_ray(tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": "127.0.0.1:9", "COLUMNS": "250"}
    said = vhs("doctor", "--on", "ray", "--out", tmp_path, environment=environment, code=1)
    assert "can be read by others" in said and "chmod 600" in said and "nobody listens at 127.0.0.1:9" in said
    assert "there are" in vhs("doctor", "--on", "ray", "--check", "nosuch", code=1)


def test_where_there_is_no_slurm_that_is_said_once_and_nothing_is_left_behind(tmp_path):
    there, new = tmp_path / "there", tmp_path / "new"
    there.mkdir()
    environment = {"PATH": str(Path(sys.executable).parent), "COLUMNS": "250"}
    for out in (there, new):
        said = vhs("doctor", "--on", "slurm", "--cluster", "testcluster", "--out", out, environment=environment, code=1)
        assert said.count("no sbatch here") == said.count("no sinfo here") == said.count("no scontrol here") == 1 and said.count("the same as python") == 7
    assert not list(there.iterdir()) and not new.exists()


@pytest.mark.slow
def test_ray_on_three_nodes(cluster, tmp_path):
    out = tmp_path / "out"
    said = submit(cluster, tmp_path, "ray.sbatch", "vhs", "doctor", "--on", "ray", "--out", str(out), stage="generate", options="--nodes=3")
    assert "3 nodes see" in said and "problem" not in said and not list(out.iterdir())


@given(days=st.integers(0, 30), hours=st.integers(0, 23), mins=st.integers(0, 59))
def test_time_limits_are_read_as_slurm_prints_them(days, hours, mins):
    printed = f"{days}-{hours:02}:{mins:02}:00" if days else f"{hours}:{mins:02}:00" if hours else f"{mins}:00"
    assert minutes(printed) == 24 * 60 * days + 60 * hours + mins
    assert minutes("infinite") is None

"""Runs on Ray clusters that somebody else started: work handed in from outside with its code, and machines that Ray's own launcher brings up by ssh."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cluster import Cluster, folder, until
from conftest import ROOT
from test_actors import records
from test_resume import assert_same
from test_slurm_scripts import SITE

VENV = Path(sys.prefix)
CODE = ("jobs", "vhs", "shards", "configs", "slurm", "setup.cfg", "pyproject.toml", "README.md")

SSHD = """
set -e
mkdir -p {home} /run/sshd
mount --bind {home}/passwd /etc/passwd
exec /usr/sbin/sshd -D -e -o Port=22 -o HostKey={home}/host_key -o PidFile=none -o AuthorizedKeysFile={home}/.ssh/authorized_keys \
    -o StrictModes=no -o UsePAM=no -o PermitRootLogin=yes -f /dev/null
"""


@pytest.mark.slow
def test_work_is_handed_in_from_outside_with_its_code(cluster, reference, tmp_path, figure):
    """`ray job submit` to a Ray of three nodes that stays in its allocation. Every process says where it has `jobs` from."""
    said, code = tmp_path / "imported", tmp_path / "code"
    for name in CODE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        code.mkdir(exist_ok=True)
        copy(ROOT / name, code / name)
    (code / "jobs" / "__init__.py").write_text(f"with open({str(said)!r}, 'a') as out:\n    print(__file__, file=out)\n")
    line = f'eval "$(python -m jobs.cli cluster-env {SITE} --stage generate)"; '
    line += 'sbatch --parsable --output=ray.log $VHS_SBATCH --nodes=3 "$VHS_SLURM/ray.sbatch"'
    job = cluster.run(["env", f"PYTHONPATH={ROOT}", "bash", "-euc", line], cwd=tmp_path).strip()
    try:
        until(lambda: (tmp_path / f"ray-{job}.env").exists(), "Ray of three nodes")
        runtime = json.dumps({"env_vars": {"PYTHONPATH": "."}})
        submit = ["ray", "job", "submit", "--working-dir", code, "--runtime-env-json", runtime]
        work = ["python", "-m", "jobs.cli", "run", "debug/demo", "--on", "ray", "--out", tmp_path / "run"]
        command = " ".join(f"'{word}'" for word in [*submit, "--", *work])
        printed = cluster.run(["bash", "-euc", f". ./ray-{job}.env; {command}"], cwd=tmp_path)
    finally:
        cluster.run(["scancel", job])
    assert "succeeded" in printed
    assert_same(tmp_path / "run", reference, "ray job submit", figure)
    places = said.read_text().splitlines()
    assert len(places) > 3 and all("working_dir_files" in place for place in places), "the code that was shipped is the code that ran"
    assert len({record["machine"] for record in records(tmp_path / "run")}) == 3


@pytest.fixture
def machines():
    """Three machines with networks and homes of their own, an sshd on each -> (cluster, the addresses, the key)."""
    if not all(shutil.which(program, path=os.environ["PATH"] + ":/usr/sbin") for program in ("sshd", "ssh", "rsync")):
        pytest.skip("needs openssh-server, openssh-client and rsync")
    with folder() as name:
        cluster = Cluster(name)
        try:
            cluster.up("--net", "--nodes", "3")
            port = json.loads((name / "cluster.json").read_text())["port"]
            cluster.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", name / "key"])
            for number in (1, 2, 3):
                _home(name / f"home{number}", (name / "key.pub").read_text())
                script = SSHD.format(home=name / f"home{number}")
                cluster.sbatch(f"--nodelist=node{number}", "--mem=12G", "--output=/dev/null", "--oversubscribe", script=script)
            addresses = [f"10.{port >> 8}.{port & 255}.{number}" for number in (1, 2, 3)]
            until(lambda: all(_lets_in(address, name / "key") for address in addresses), "an sshd on every machine")
            yield cluster, addresses, name / "key"
        finally:
            cluster.down()


def _lets_in(address: str, key: Path) -> bool:
    options = ["-oStrictHostKeyChecking=no", "-oUserKnownHostsFile=/dev/null", "-oConnectTimeout=2", "-oBatchMode=yes"]
    return not subprocess.run(["ssh", "-i", key, *options, f"me@{address}", "true"], capture_output=True).returncode


def _home(home: Path, key: str):
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "authorized_keys").write_text(key)
    # first, for ssh asks whose home ~ is by the user's number
    (home / "passwd").write_text(f"me:x:0:0::{home}:/bin/bash\n" + Path("/etc/passwd").read_text())
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "host_key"], check=True)


@pytest.mark.slow
def test_a_cluster_that_rays_launcher_brings_up(machines, reference, tmp_path, figure):
    """configs/ray/local.yaml with these addresses; the environment is linked, not installed, for that would take minutes a machine."""
    cluster, addresses, key = machines
    mine = yaml.safe_load((ROOT / "configs" / "ray" / "local.yaml").read_text())
    mine["provider"] |= {"head_ip": addresses[0], "worker_ips": addresses[1:]}
    mine["auth"] = {"ssh_user": "me", "ssh_private_key": str(key)}
    mine["setup_commands"] = [mine["setup_commands"][0], f"ln -sfn {VENV} ~/vhs/.venv"]
    activate = ". ~/vhs/.venv/bin/activate"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):  # as an installation there would: its code, not that of the environment here
        mine[name] = [line.replace(activate, f"export PYTHONPATH=~/vhs; {activate}") for line in mine[name]]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    run = tmp_path / "run"

    def launcher(*words: str) -> str:
        return cluster.run(["env", f"HOME={tmp_path}", f"PATH={VENV}/bin:{os.environ['PATH']}", "ray", *words], cwd=ROOT)

    launcher("get-auth-token", "--generate")
    launcher("up", "--yes", "--no-config-cache", f"{tmp_path}/mine.yaml")
    enter = f"export PYTHONPATH=~/vhs RAY_AUTH_MODE=token RAY_ADDRESS=localhost:6379; {activate}"
    until(lambda: launcher("exec", f"{tmp_path}/mine.yaml", f"{enter}; ray list nodes").count("ALIVE") >= 3, "three nodes", patience_s=240)
    launcher("exec", f"{tmp_path}/mine.yaml", f"{enter}; cd ~/vhs; python -m jobs.cli run debug/demo --on ray --out {run}")
    assert_same(run, reference, "ray up, three machines over ssh", figure)
    assert len({record["machine"] for record in records(run)}) == 3
    launcher("down", "--yes", f"{tmp_path}/mine.yaml")

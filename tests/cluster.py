"""The project's own SLURM cluster as the tests use it: the program slurm/testcluster/cluster, and SLURM's commands in its environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "slurm" / "testcluster" / "cluster"
SEARCH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"  # as a shell that activated this environment has it
PATIENCE_S = 240  # for what takes seconds on an idle machine


def until(ready: Callable[[], object], what: str, patience_s: float = PATIENCE_S):
    """Wait for a true value of `ready()` -> that value; fails saying `what` was awaited and the last value."""
    deadline = time.monotonic() + patience_s
    while not (value := ready()):
        assert time.monotonic() < deadline, f"not within {patience_s:.0f} s: {what}; at last {value!r}"
        time.sleep(0.2)
    return value


class Cluster:
    """A cluster in a folder of its own, and what a test asks of it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.environment |= {"SLURM_CONF": f"{folder}/etc/slurm.conf", "PATH": SEARCH}

    def run(self, command: list[str | Path], **options) -> str:
        """Run any command to its end where SLURM's clients speak to this cluster -> its standard output. It must end with 0."""
        done = subprocess.run([*map(str, command)], env=self.environment, capture_output=True, text=True, **options)
        assert done.returncode == 0, f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def up(self, *options: str) -> str:
        return self.run([PROGRAM, "up", self.folder, *options])

    def down(self) -> str:
        return self.run([PROGRAM, "down", self.folder])

    def node(self, number: int, power: str) -> None:
        """Cut the power of node `number` ("off") or give it back ("on")."""
        self.run([PROGRAM, "node", str(number), power, self.folder])

    def daemon(self, name: str, power: str) -> None:
        """End slurmctld or slurmdbd ("off"), or start it again ("on"); nodes and their jobs go on."""
        self.run([PROGRAM, "daemon", name, power, self.folder])

    def sbatch(self, *options: str | Path, script: str) -> str:
        """Submit a bash script -> the job's id."""
        return self.run(["sbatch", "--parsable", *options], input=f"#!/bin/bash\n{script}\n").strip()

    def job(self, job: str) -> dict[str, str]:
        """What slurmctld knows of a job now: JobState, NodeList, Restarts, Reason, …"""
        return dict(re.findall(r"(\w+)=(\S*)", self.run(["scontrol", "--oneliner", "show", "job", job])))

    def sacct(self, job: str, *options: str) -> list[dict[str, str]]:
        """What accounting knows of a job, one row for each task of an array: JobID, State, ExitCode, NodeList. It lags by seconds.

        Add "--duplicates" for the runs before a requeue, which have rows of their own.
        """
        fields = ["JobID", "State", "ExitCode", "NodeList"]
        lines = self.run(["sacct", "-X", "-n", "-P", f"--jobs={job}", f"--format={','.join(fields)}", *options]).splitlines()
        return [dict(zip(fields, line.split("|"), strict=True)) for line in lines]


@contextmanager
def folder() -> Iterator[Path]:
    """A folder with a name short enough for sockets; pytest's own are too long. Skips where no cluster can be."""
    if not all(shutil.which(program, path=SEARCH) for program in ("slurmctld", "slurmd", "slurmdbd", "munged", "mariadbd")):
        pytest.skip("SLURM is not installed: .ci/run names the Debian packages")
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("a cluster needs root that may make namespaces")
    with tempfile.TemporaryDirectory(prefix="vhs-") as name:
        yield Path(name)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four nodes. Each test process that asks has a cluster of its own, so that no test's power cut is another's."""
    with folder() as name:
        ours = Cluster(name)
        ours.up()
        try:
            yield ours
        finally:
            ours.down()

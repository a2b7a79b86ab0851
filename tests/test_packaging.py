"""A wheel carries everything: in an empty folder it makes the bytes that the checkout makes, and the sites and scripts of a cluster are in it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, committed


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):  # a copy, so that no build folder is left in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("vhs-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def python(installed: Path, folder: Path, *arguments: str) -> str:
    """`python ARGUMENTS` in `folder` with the wheel's modules -> what it printed."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_runs_in_an_empty_folder(installed, reference, tmp_path, figure):
    empty = tmp_path / "empty"
    python(installed, empty, "-m", "jobs.cli", "run", "debug/demo", "--out", "run")
    assert str(installed) in python(installed, empty, "-c", "import jobs, vhs.report; print(jobs.__file__)"), "the wheel's own modules ran"
    ours, theirs = committed(empty / "run"), committed(reference)
    figure(f"compared {len(theirs)} files of the checkout's run and the wheel's")
    assert len(theirs) > 0 and ours == theirs


def test_a_wheel_carries_sites_and_scripts(installed, tmp_path):
    for kind, carried in (("configs", "clusters/*.yaml"), ("configs", "ray/*.yaml"), ("slurm", "*.sbatch"), ("slurm", "*.sh")):
        ours = sorted((ROOT / kind).glob(carried))
        assert ours
        for file in ours:
            assert (installed / "vhs" / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
    exports = python(installed, tmp_path / "empty", "-m", "jobs.cli", "cluster-env", "example")
    scripts = subprocess.run(["bash", "-c", f'{exports}\nls "$VHS_SLURM"'], capture_output=True, text=True, check=True).stdout
    assert f"VHS_SLURM={installed}" in exports and "pipeline.sbatch" in scripts.split()

"""A wheel carries everything: in an empty folder it makes the bytes that the checkout makes."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

from conftest import ROOT, committed


def test_a_wheel_runs_in_an_empty_folder(reference, tmp_path, figure):
    source, empty, site = tmp_path / "source", tmp_path / "empty", tmp_path / "site"
    empty.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for name in filter(None, files):  # a copy, so that no build folder is left in the checkout
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("vhs-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for file in (ROOT / "configs").rglob("*.*"):
        assert (site / "vhs" / "configs" / file.relative_to(ROOT / "configs")).read_bytes() == file.read_bytes()
    result = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "run", "debug/demo", "--out", "run"],
        cwd=empty,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (
        str(site)
        in subprocess.run(
            [sys.executable, "-c", "import jobs, vhs.report; print(jobs.__file__)"],
            cwd=empty,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(site)},
        ).stdout
    ), "the wheel's own modules ran"
    ours, theirs = committed(empty / "run"), committed(reference)
    figure(f"compared {len(theirs)} files of the checkout's run and the wheel's")
    assert len(theirs) > 0 and ours == theirs

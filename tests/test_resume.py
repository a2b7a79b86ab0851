"""The same command again resumes: kill -9 anywhere, two starts at once, and the bytes are those of an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import signal

import pytest
from cluster import until
from conftest import command, committed, markers, vhs

from jobs import claim, config, plan
from shards import crash

# Where a run is killed: (window, passage counted from the start of the process), by the part of the run it falls into when the parts before are done
# or killed too. One of each part makes four kills a run, none of which can fail to come.
PARTS = (
    (
        "plan-before-commit",
        "claim:1",
        "write-begun:12",
        "tar-half-written:1",
        "tar-before-sidecar:1",
        "sidecar-written-not-linked:2",
        "training-step:3",
    ),  # ingest, labeller
    (
        "files-before-marker:2",
        "training-step:9",
        "checkpoint-half-written:2",
        "name-made:9",
    ),  # between labeller and generator: mid DreamBooth step, mid checkpoint
    ("round-before-commit:2", "claim-not-dropped:3", "tar-half-written:2", "tar-before-sidecar:3", "table-written-not-linked:2"),  # generation, labels
    ("training-step:4", "files-before-marker:2", "checkpoint-half-written:1", "report-half-written:1"),  # classifiers, report
)
SHUFFLED = [random.Random(137).sample(part, len(part)) for part in PARTS]
WINDOWS = sorted({kill for part in PARTS for kill in part})


def interrupt(run, where: str, total: int) -> int:
    """Start the debug run, to be killed at `where` -> units committed by then. The kill must have come, and work must be left."""
    process = command("run", "debug/demo", "--out", run, environment={"VHS_CRASH_AT": where})
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, f"{where}: exit {process.returncode}\n{printed}"
    done = len(markers(run)) if run.exists() else 0
    assert done < total, f"{where}: nothing was left to do"
    return done


def assert_same(run, reference, what: str, figure):
    """Every committed file of `run` has the reference's sha256, and there is no other."""
    ours, theirs = committed(run), committed(reference)
    assert len(theirs) > 0 and ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    different = [name for name in theirs if ours[name] != theirs[name]]
    kinds = {suffix: sum(name.endswith(suffix) for name in theirs) for suffix in (".tar", ".parquet", ".json", ".safetensors")}
    figure(f"{what}: compared {len(theirs)} files {kinds}, {len(different)} differ")
    assert not different, different


def test_the_windows_are_those_of_the_code():
    assert {kill.partition(":")[0] for kill in WINDOWS} == set(crash.WINDOWS)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_four_times_and_resumed(seed, reference, tmp_path, figure):
    total, run = len(markers(reference)), tmp_path / "run"
    kills = [part[seed % len(part)] for part in SHUFFLED]  # no window twice before each of its part has come
    done = [interrupt(run, where, total) for where in kills]
    vhs("run", "debug/demo", "--out", run)
    assert_same(
        run, reference, f"seed {seed}: killed at {', '.join(f'{k} with {n} of {total} units done' for k, n in zip(kills, done))}", figure
    )


def test_workers_that_train_save_when_their_run_is_asked_to_stop(reference, tmp_path):
    """Two side by side: each ends at the end of a step, with a checkpoint of it, though the next regular one is far."""
    asked = ["classifier.epochs=400", "execution.workers=2", "execution.checkpoint_steps=100000"]
    run = plan.start(config.load("debug/demo", asked), str(tmp_path / "run"))
    plan.adopt_all(run, str(reference))
    process = command("stage", "train", run.url, "--share", "0/1")
    try:
        log = tmp_path / "run" / "state" / "claims"
        until(lambda: len([beat for beat in log.glob("*.beat") if json.loads(beat.read_text()).get("step", 0) > 2]) >= 2, "two trainings at work")
        process.terminate()
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    ended = [claim.read(run.storage, name) for name in run.storage.list(claim.FOLDER) if name.endswith(".json")]
    assert [one.how for one in ended] == ["interrupted"] * 2 and all("saved at step" in one.cause for one in ended), (ended, printed)
    assert {name.split("/")[1] for name in run.storage.list("checkpoints/")} == {one.identity for one in ended}
    assert "Traceback" not in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("where", WINDOWS)
def test_killed_once_in_each_window(where, reference, tmp_path, figure):
    run = tmp_path / "run"
    done = interrupt(run, where, len(markers(reference)))
    vhs("run", "debug/demo", "--out", run)
    assert_same(run, reference, f"killed at {where} with {done} of {len(markers(reference))} units done", figure)


def test_a_finished_run_does_nothing(reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    before = {name: (run / name).stat().st_mtime_ns for name in markers(run)}
    printed = vhs("run", "debug/demo", "--out", run)
    assert "units to do" not in printed
    assert {name: (run / name).stat().st_mtime_ns for name in markers(run)} == before


@pytest.mark.slow
def test_two_starts_at_once_share_the_work(reference, tmp_path, figure):
    run = tmp_path / "run"
    both = [command("run", "debug/demo", "--out", run) for _ in range(2)]
    for process in both:
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed
    assert_same(run, reference, "two at once", figure)
    records = [json.loads(file.read_text()) for file in (run / "state" / "done").iterdir()]
    by = {process.pid: sum(record["pid"] == process.pid for record in records) for process in both}
    figure(f"units committed by each process: {by}")
    assert sum(by.values()) == len(records) == len(markers(run)), "a unit was committed twice, or by nobody"
    assert all(by.values()), "one of the two did nothing"


@pytest.mark.slow
def test_a_lost_worker_is_said_and_the_run_goes_on(reference, tmp_path, figure):
    run = tmp_path / "run"
    printed = vhs("run", "debug/demo", "execution.workers=2", "--out", run, environment={"VHS_CRASH_AT": "tar-half-written:1"}, code=1)
    assert "a worker process died" in printed
    vhs("run", "debug/demo", "execution.workers=2", "--out", run)
    assert_same(run, reference, "two workers, one of them killed", figure)

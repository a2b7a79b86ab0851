"""Workers are killed, stopped and starved, their object store is troubled: nothing is lost, twice, torn or other. And the proof would see it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, vhs

from jobs import history, plan
from jobs.chaos import observer, payload, storm
from jobs.chaos.proxy import TROUBLES
from shards import posix
from shards.crash import HARMS, WINDOWS
from shards.storage import open_storage


@pytest.fixture(scope="session")
def quiet(tmp_path_factory) -> dict[str, str]:
    """The files of an undisturbed run, with their sha256."""
    return storm.undisturbed(str(tmp_path_factory.mktemp("quiet") / "run"), pipeline=False)


def said(outcomes: list[storm.Outcome], figure):
    fired = sum((outcome.fired for outcome in outcomes), Counter())
    by_window = {window: sum(n for (where, _), n in fired.items() if where == window) for window in WINDOWS}
    troubles = {f"{where} {harm}": n for (where, harm), n in sorted(fired.items()) if where not in WINDOWS}
    figure(f"{sum(fired.values())} faults in {len(outcomes)} runs: {by_window}, {troubles}; {sum(one.compared for one in outcomes)} files compared")
    assert all(outcome.compared and outcome.workers > storm.WORKERS for outcome in outcomes), "nobody had to follow anybody"
    assert not [line for outcome in outcomes for line in outcome.wrong]
    return fired, by_window


def test_a_storm_on_this_disk(quiet, tmp_path, figure):
    """Every window at least once."""
    schedules, schedule, outcomes = storm.schedules(1), None, []
    while len(outcomes) < 2 or min(schedule.met[window] for window in WINDOWS) < 1:
        schedule = next(schedules)
        outcomes.append(storm.storm(str(tmp_path / str(len(outcomes))), schedule, 30, quiet))
    said(outcomes, figure)


def test_a_storm_in_an_object_store_that_restarts(server, bucket, quiet, figure):
    calls = []

    def restart():
        calls.append(server.restart())

    fired, _ = said([storm.storm(bucket, next(storm.schedules(5)), 20, quiet, meanwhile=restart)], figure)
    assert len(calls) == 1 and {harm for where, harm in fired if where not in WINDOWS} >= {"500", "503", "reset", "lost", "truncated"}


def overwriting(out: str, *kind):
    """A worker on a storage that does not create names but writes over them, and tars under their names from their first byte on."""

    def replace(temporary: Path, target: Path) -> bool:
        with open(target, "wb") as file:
            data = temporary.read_bytes()
            file.write(data[:1024])
            file.flush()
            time.sleep(0.3 if target.suffix == ".tar" else 0)
            file.write(data[1024:])
        return True

    posix._link = replace
    payload.work(out, *kind)


class StandingStill(storm.Schedule):
    """The first two workers stop before the commit of a shard, and are overtaken by the third before they go on with it."""

    def next(self) -> str:
        self.given = getattr(self, "given", 0) + 1
        return "sidecar-written-not-linked=stop" if self.given < storm.WORKERS else ""


def test_a_storage_that_overwrites_is_found_out(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "work", overwriting)
    monkeypatch.setattr(storm, "STANDS_STILL_S", 20)  # whatever else this machine does
    outcome = storm.storm(str(tmp_path / "run"), StandingStill(1), 3, quiet)
    assert any(name.endswith(".parquet") for name in outcome.twice), outcome.wrong
    assert any("torn tar" in line or "is not the tar" in line for line in outcome.torn), outcome.wrong


def test_a_reader_sees_what_is_torn_and_nothing_else(quiet, tmp_path):
    run = tmp_path / "run"
    assert storm.undisturbed(str(run), pipeline=False).keys() == quiet.keys()
    storage = open_storage(run)
    assert observer.look(storage, set()) == []
    shard, other = sorted((run / "generated" / "split" / "small").glob("*.tar"))[:2]
    shard.write_bytes(shard.read_bytes()[:1024])  # as if it had been opened under its final name
    other.unlink()
    sidecar = sorted(shard.parent.glob("*.parquet"))[2]
    sidecar.write_bytes(sidecar.read_bytes()[:-4])
    seen = observer.look(storage, set())
    assert any("torn tar" in line for line in seen) and any("gone or never there" in line and other.name in line for line in seen)
    assert any(f"{sidecar.name}: torn" in line for line in seen)
    assert all(any(file.name[:6] in line for file in (shard, other, sidecar)) or "shards.txt" in line for line in seen), seen


def test_the_command_counts_what_it_did(tmp_path):
    printed = vhs("chaos", "--out", tmp_path / "chaos", "--faults", 1, "--least", 0, "--a-run", 3, "--seed", 2)
    assert "faults that fired" in printed and "nothing lost, twice, torn or other" in printed
    assert any(window in printed for window in WINDOWS) and any(harm in printed for harm in HARMS)


@pytest.mark.timeout(3600)
@pytest.mark.slow
@pytest.mark.parametrize(("place", "seed", "seeds"), [("disk", 100, 12), ("s3", 200, 8)])
def test_five_hundred_faults_in_two_places(place, seed, seeds, server, quiet, tmp_path, figure):
    """Half of them in each, of at least 20 seeds; every window, and every trouble of an object store, at least five times."""
    schedules, schedule, outcomes = storm.schedules(seed), None, []
    while len(outcomes) < seeds or min(schedule.met[window] for window in WINDOWS) < 5:
        schedule = next(schedules)
        name = f"chaos-{os.getpid()}-{len(outcomes)}"
        out = str(tmp_path / name) if place == "disk" else f"s3://chaos/{name}/run"
        if place == "s3":
            open_storage(f"s3://chaos/{name}").put("other", b"")
        outcomes.append(storm.storm(out, schedule, 40, quiet, meanwhile=server.restart if place == "s3" else lambda: None))
    fired, by_window = said(outcomes, figure)
    assert sum(fired.values()) >= 250 and min(by_window.values()) >= 5
    if place == "s3":
        troubles = Counter({trouble: sum(n for (_, harm), n in fired.items() if harm == trouble) for trouble in TROUBLES})
        assert min(troubles.values()) >= 5, troubles


@pytest.mark.slow
def test_the_real_stages_in_a_storm(reference, tmp_path, figure):
    """debug/demo itself: the figures of the undisturbed run are those of the reference that every test has."""
    quiet, schedules, outcomes = storm.undisturbed(str(tmp_path / "quiet"), pipeline=True), storm.schedules(7), []
    assert storm.committed(str(reference)) == quiet
    while sum(sum(outcome.fired.values()) for outcome in outcomes) < 25:
        outcomes.append(storm.storm(str(tmp_path / str(len(outcomes))), next(schedules), 15, quiet, pipeline=True))
    said(outcomes, figure)


MANY = (  # 976 real images, 24 priors, 99,000 drawn
    "phantoms.count=976", "ingest.shard_images=122", "generation.unit_images=1000", "generation.round_units=33", "generation.max_rounds=1", "seeds=[0]",
)  # fmt: skip
READ_EACH = """
import sys
from shards import manifest, reader
from shards.storage import open_storage
storage = open_storage(sys.argv[1])
table = manifest.load(storage, paths=[name for name in storage.list() if name.startswith(("real/", "priors/", "generated/")) and name.endswith(".parquet")])
images = reader.ShardReader(storage, table)
for indices, _, _, data in reader.stream(images, reader.permutation(len(images), 1, 0), 500, 0, 1, decode=len):
    print(*(images.keys[i] for i, size in zip(indices, data) if size), sep="\\n")
"""


class Killing(storm.Schedule):
    """kill -9 and nothing else."""

    def next(self) -> str:
        return re.sub("=[a-z0-9]+", "=kill", super().next())


def measured(*command: str) -> tuple[str, float]:
    """-> (what it printed, GiB that it had resident at most)."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, printed
    return printed, usage.ru_maxrss / (1 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_hundred_thousand_images(place, request, tmp_path, figure):
    """1,000 a shard, workers killed on the way: verify counts them, a reader reads each once, and nobody holds them all in memory."""
    out = str(tmp_path / "run") if place == "disk" else request.getfixturevalue("bucket")
    quiet = storm.undisturbed(str(tmp_path / "quiet"), False, MANY)
    outcome = storm.storm(out, Killing(3), 20, quiet, settings=MANY)
    killed = sum(n for (_, harm), n in outcome.fired.items() if harm == "kill")
    assert killed and not outcome.wrong
    counted, verifying = measured("-m", "jobs.cli", "verify", out)
    assert re.search(r"\b100000 samples, 0 errors\b", counted), counted
    keys, reading = measured("-c", READ_EACH, out)
    assert len(keys.split()) == len(set(keys.split())) == 100_000
    working = max(record["peak_gb"] for record in history.done_records(plan.reopen(out)))
    figure(f"{place}: {killed} of {outcome.workers} workers killed; GiB: {working / 1.074:.2f} working, {verifying:.2f} verifying, {reading:.2f} reading")
    assert max(working, verifying, reading) <= 1

"""Workers are killed, stopped and starved, their object store is troubled: nothing is lost, twice, torn or other. And the proof would see it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import vhs

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
    schedules = storm.schedules(1)
    said([storm.storm(str(tmp_path / str(n)), next(schedules), 30, quiet) for n in range(2)], figure)


def test_a_storm_in_an_object_store_that_restarts(server, bucket, quiet, figure):
    calls = []

    def restart():
        calls.append(server.restart())

    fired, _ = said([storm.storm(bucket, next(storm.schedules(5)), 20, quiet, meanwhile=restart)], figure)
    assert len(calls) == 1 and {harm for where, harm in fired if where not in WINDOWS} >= {"500", "503", "reset", "lost", "truncated"}


def overwriting(out: str, pipeline: bool):
    """A worker on a storage that does not create names but writes over them."""

    def replace(temporary: Path, target: Path) -> bool:
        shutil.copyfile(temporary, target)
        return True

    posix._link = replace
    payload.work(out, pipeline)


def test_a_storage_that_overwrites_is_found_out(quiet, tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "work", overwriting)
    schedules = storm.schedules(1)
    outcomes = [storm.storm(str(tmp_path / str(n)), next(schedules), 30, quiet) for n in range(2)]
    assert any(outcome.twice for outcome in outcomes), [outcome.wrong for outcome in outcomes]


def test_a_reader_sees_what_is_torn_and_nothing_else(quiet, tmp_path):
    run = tmp_path / "run"
    assert storm.undisturbed(str(run), pipeline=False).keys() == quiet.keys()
    storage = open_storage(run)
    assert observer.look(storage, set()) == []
    shard, other = sorted((run / "generated" / "split" / "small").glob("*.tar"))[:2]
    shard.write_bytes(shard.read_bytes()[:1024])  # as if it had been opened under its final name
    other.unlink()
    seen = observer.look(storage, set())
    assert any("torn tar" in line for line in seen) and any("gone or never there" in line and other.name in line for line in seen)
    assert all(shard.name[:6] in line or other.name[:6] in line for line in seen), seen


def test_the_command_counts_what_it_did(tmp_path):
    printed = vhs("chaos", "--out", tmp_path / "chaos", "--faults", 1, "--least", 0, "--a-run", 3, "--seed", 2)
    assert "faults that fired" in printed and "nothing lost, twice, torn or other" in printed
    assert any(window in printed for window in WINDOWS) and any(harm in printed for harm in HARMS)


@pytest.mark.slow
def test_five_hundred_faults_on_disk_and_in_an_object_store(server, quiet, tmp_path, figure):
    """At least 20 seeds, every window at least five times in each place."""
    for place, seeds in (("disk", 12), ("s3", 8)):
        schedules, schedule, outcomes = storm.schedules(100), None, []
        while len(outcomes) < seeds or min(schedule.met[window] for window in WINDOWS) < 5:
            schedule = next(schedules)
            name = f"chaos-{os.getpid()}-{len(outcomes)}"
            out = str(tmp_path / name) if place == "disk" else f"s3://{name}/run"
            if place == "s3":
                open_storage(f"s3://{name}").put("other", b"")
            outcomes.append(storm.storm(out, schedule, 40, quiet, meanwhile=server.restart if place == "s3" else lambda: None))
        fired, by_window = said(outcomes, figure)
        assert sum(fired.values()) >= 250 and min(by_window.values()) >= 5, place
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

"""Claims: one worker a unit, dead and silent owners are overtaken, the overtaken stop."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest

from jobs.claim import Claim, Superseded, attempts, close, owner, read
from jobs.interrupt import Interrupted
from shards.storage import open_storage

QUICK = {"heartbeat_s": 0.05, "stale_s": 0.4}


def _take(folder, barrier, won):
    barrier.wait()
    if Claim.take(open_storage(folder), "unit", **QUICK):
        won.put(owner()["pid"])
        time.sleep(1)  # alive while the others try


def test_of_racing_processes_one_gets_the_claim(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, won = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_take, args=(str(tmp_path), barrier, won)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert won.get(timeout=1) and won.empty()


def test_a_live_claim_is_respected_and_gone_after_use(tmp_path):
    storage = open_storage(tmp_path)
    with Claim.take(storage, "unit", **QUICK):
        for _ in range(4):  # longer than stale_s, but its heart beats
            assert Claim.take(storage, "unit", **QUICK) is None
            time.sleep(0.2)
    assert storage.list("state/claims/") == []
    assert Claim.take(storage, "unit", **QUICK).attempt == 0


def test_a_claim_of_a_dead_process_here_is_overtaken_at_once(tmp_path):
    storage = open_storage(tmp_path)
    storage.commit("state/claims/unit-0000.json", json.dumps({**owner(), "started": "1"}).encode())  # this pid, but another process
    assert Claim.take(storage, "unit", **QUICK).attempt == 1


def test_a_silent_claim_of_another_machine_is_overtaken_after_it_stood_still(tmp_path):
    storage = open_storage(tmp_path)
    storage.commit("state/claims/unit-0000.json", json.dumps({**owner(), "machine": "elsewhere"}).encode())
    storage.put("state/claims/unit-0000.beat", b"1")
    assert Claim.take(storage, "unit", **QUICK) is None
    storage.put("state/claims/unit-0000.beat", b"2")
    time.sleep(0.5)
    assert Claim.take(storage, "unit", **QUICK) is None, "the beat changed since it was last seen"
    time.sleep(0.5)
    assert Claim.take(storage, "unit", **QUICK).attempt == 1


def test_the_overtaken_attempt_stops_at_its_next_heartbeat(tmp_path):
    storage = open_storage(tmp_path)
    with Claim.take(storage, "unit", **QUICK) as claim:
        claim.check()
        storage.commit("state/claims/unit-0001.json", json.dumps({**owner(), "machine": "elsewhere"}).encode())
        time.sleep(0.3)
        with pytest.raises(Superseded, match="attempt 0 was taken over"):
            claim.check()
    ours = read(storage, "state/claims/unit-0000.json")
    assert ours.how == "superseded" and ours.ended_s >= ours.began_s > 0
    assert storage.list("state/claims/") == ["state/claims/unit-0000.json", "state/claims/unit-0001.json"], "the newer claim is not ours to drop"


def test_an_attempt_leaves_word_of_how_it_ended(tmp_path):
    storage, kill = open_storage(tmp_path), {**owner(), "machine": "elsewhere"}
    for error in (ValueError("no such thing"), Interrupted("SIGTERM")):
        with pytest.raises(type(error)), Claim.take(storage, "unit", **QUICK):
            raise error
    storage.commit("state/claims/unit-0002.json", json.dumps(kill).encode())
    assert Claim.take(storage, "unit", **QUICK) is None
    time.sleep(0.5)
    with Claim.take(storage, "unit", **QUICK) as claim:
        assert claim.attempt == 3 and [one.how for one in claim.before] == ["failed", "interrupted", ""]
    found = [read(storage, name) for name in storage.list("state/claims/")]
    assert [one.how for one in found] == ["failed", "interrupted", "", "done"]
    assert [one.cause for one in found] == ["ValueError: no such thing", "Interrupted: SIGTERM", "", ""]


def test_a_killed_attempt_that_was_seen_holds_nobody_up(tmp_path):
    storage = open_storage(tmp_path)
    storage.commit("state/claims/unit-0000.json", json.dumps({**owner(), "machine": "elsewhere"}).encode())
    assert Claim.take(storage, "unit", **QUICK) is None
    close(storage, attempts(storage, "unit")[0], "its node failed")
    with Claim.take(storage, "unit", **QUICK) as claim:
        assert [(one.how, one.cause) for one in claim.before] == [("killed", "its node failed")]
        claim.withdraw()
    assert [one.number for one in attempts(storage, "unit")] == [0], "one that withdraws leaves no trace"


def test_no_key_of_the_environment_is_in_a_word_on_an_attempt(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "swordfish-and-more")
    storage = open_storage(tmp_path)
    with pytest.raises(ValueError), Claim.take(storage, "unit", **QUICK):
        raise ValueError("the store said: swordfish-and-more is wrong")
    storage.commit("state/claims/unit-0001.json", json.dumps({**owner(), "machine": "elsewhere"}).encode())
    close(storage, attempts(storage, "unit")[1], "s3://me:swordfish-and-more@bucket")
    said = [storage.read(name).decode() for name in storage.list()]
    assert len(said) == 2 and not any("swordfish" in word for word in said) and "[AWS_SECRET_ACCESS_KEY]" in said[0]


def test_a_claim_without_its_bytes_is_nobodys(tmp_path):
    """What a power cut may leave of bookkeeping."""
    storage = open_storage(tmp_path)
    storage.commit("state/claims/unit-0000.json", b"")
    assert Claim.take(storage, "unit", **QUICK) is None
    time.sleep(0.5)
    assert Claim.take(storage, "unit", **QUICK).attempt == 1

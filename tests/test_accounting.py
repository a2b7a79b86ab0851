"""A unit that kills its jobs is given up after `execution.tries` of them, whether SLURM's accounting can say why or not."""

from __future__ import annotations

import json

import pytest

from jobs import accounting, failures
from jobs.claim import attempts, owner
from jobs.unit import Unit
from shards.storage import open_storage

UNIT = Unit("train", "classifier/real/split/seed-0", "json", {}, {}, {})


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """Of a run, three of whose jobs were killed at UNIT; who waits for accounting does so for a second."""
    monkeypatch.setattr(accounting, "WAIT_S", 1)
    monkeypatch.setattr(accounting, "LOOK_S", 0.1)
    opened = open_storage(tmp_path)
    for number in range(3):
        opened.commit(f"state/claims/{UNIT.identity}-{number:04d}.json", json.dumps({**owner(), "machine": "elsewhere", "job": f"7_{number}"}).encode())
    return opened


def test_without_accounting_every_killed_job_is_a_try(storage, monkeypatch):
    monkeypatch.setattr(accounting.scheduler, "ask", _silent)
    failure = accounting.judge(storage, UNIT, tuple(attempts(storage, UNIT.identity)), tries=3)
    assert failure and failure.tries == 3 and "no accounting" in failure.reason
    assert [one.how for one in attempts(storage, UNIT.identity)] == ["killed"] * 3


def test_what_accounting_does_not_know_yet_is_no_try(storage, monkeypatch):
    monkeypatch.setattr(accounting.scheduler, "ask", lambda *_, **__: "")
    assert accounting.judge(storage, UNIT, tuple(attempts(storage, UNIT.identity)), tries=3) is None
    assert failures.read(storage, UNIT.identity) is None and [one.how for one in attempts(storage, UNIT.identity)] == [""] * 3


def test_fewer_than_the_tries_wait_for_nobody(storage, monkeypatch):
    monkeypatch.setattr(accounting.scheduler, "ask", _silent)
    monkeypatch.setattr(accounting.time, "sleep", lambda _: pytest.fail("waited"))
    assert accounting.judge(storage, UNIT, tuple(attempts(storage, UNIT.identity)), tries=4) is None
    assert failures.read(storage, UNIT.identity) is None


def _silent(*_, **__):
    raise RuntimeError("no sacct here: is this a machine that submits to SLURM?")

"""Several machines at one unit: who follows is not left waiting for a leader that is gone."""

from __future__ import annotations

import multiprocessing
import os
import time
from threading import Thread

import pytest

from jobs.gang import Gang

TIMES = {"heartbeat_s": 0.1, "stale_s": 1.5}


def _lead(url: str, alive):
    with Gang(url, "job", 2, 0, **TIMES):
        time.sleep(3)  # no word for longer than stale_s, as when it has nothing to do
        alive.set()
        time.sleep(60)


def _no_part(*_):
    raise AssertionError("no unit was begun")


def test_followers_of_a_killed_leader_end(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    alive = spawn.Event()
    leader = spawn.Process(target=_lead, args=(str(tmp_path), alive))
    leader.start()
    killed: list[float] = []

    def kill_once_it_has_lived_long():
        assert alive.wait(60)
        os.kill(leader.pid, 9)
        killed.append(time.monotonic())

    Thread(target=kill_once_it_has_lived_long).start()
    with pytest.raises(RuntimeError, match="the first of 2 machines, which leads, fell silent"):
        Gang(str(tmp_path), "job", 2, 1, **TIMES).follow(_no_part)
    assert killed, "it was given up while it lived"


def test_followers_end_with_the_leaders_last_word(tmp_path):
    with Gang(str(tmp_path), "job", 2, 0, **TIMES):
        pass
    Gang(str(tmp_path), "job", 2, 1, **TIMES).follow(_no_part)

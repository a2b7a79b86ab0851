"""Units in, outcomes out: where attempts run. Here: this process, or several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from jobs import interrupt, world
from jobs.attempt import Watch, attempt
from jobs.config import Config
from jobs.gang import Gang
from jobs.unit import Unit
from shards.credentials import without_keys

SAVE_S = 45  # of which the ranks of a worker have 30


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `state`: done | busy (somebody else is at work on it) | failed (`error` says why; the traceback is in state/failures)."""

    unit: Unit
    state: str
    error: str = ""


def backend_of(name: str):
    """The class behind `--on NAME`: a context manager made of a Config, whose `run(url, config, units, watch)` yields outcomes as they come."""
    if name == "ray":
        from jobs.actors import Actors

        return Actors
    return Local


class Local:
    """Attempts on this machine: one after the other in this process, or `execution.workers` side by side, each a process that keeps its models loaded."""

    def __init__(self, config: Config, gang: Gang | None = None):
        """`gang`: the machines that units of several ranks run on, of which this is the leader; else all ranks run here."""
        self._pool, self._gang = None, gang
        if config.execution.workers > 1:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                config.execution.workers, mp_context=spawn, initializer=_worker, initargs=(config.threads, os.getpid())
            )

    def __enter__(self) -> Local:
        return self

    def __exit__(self, error, *_):
        if self._pool and error:
            _end(multiprocessing.active_children())
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def run(self, url: str, config: Config, units: list[Unit], watch: Watch | None = None) -> Iterator[Outcome]:
        """Attempt every unit; outcomes as they come. A worker that dies (out of memory, killed) raises: the same command resumes."""
        if not self._pool or len(units) == 1:
            for unit in units:
                interrupt.check()
                yield outcome(url, config, unit, watch, self._gang)
            return
        futures = [self._pool.submit(_in_worker, url, config, unit) for unit in units]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process died (killed, or out of memory): nothing is lost, the same command goes on where it stopped"
            ) from None


def outcome(url: str, config: Config, unit: Unit, watch: Watch | None = None, gang: Gang | None = None) -> Outcome:
    """An attempt here, its error a word in the outcome."""
    try:
        return Outcome(unit, attempt(url, config, unit, watch, gang))
    except Exception as error:
        return Outcome(unit, "failed", without_keys(f"{type(error).__name__}: {error}"))


def _in_worker(url: str, config: Config, unit: Unit) -> Outcome:
    interrupt.listen()
    try:
        return outcome(url, config, unit)
    except interrupt.Interrupted:
        os._exit(1)  # what there was to save is saved; a pool's worker outlives any exception, and would begin another unit
    finally:
        interrupt.stop_listening()  # with nothing to save a signal just ends it


def _end(workers: list):
    """Trainings save at the end of their step; who takes longer than SAVE_S is killed, and only steps are lost by that."""
    for process in workers:
        process.terminate()
    until = time.monotonic() + SAVE_S
    for process in workers:
        process.join(max(0, until - time.monotonic()))
        process.kill()


def _worker(threads: int, parent: int):
    """A worker ends with the process that started it, however that ends."""
    world.set_environment(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its workers
    world.end_with(parent)

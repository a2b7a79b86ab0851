"""A clock that is not there, for tests/simulation.py: the threads of all simulated processes are greenlets, and time is when the next of them has its turn."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

from greenlet import getcurrent, greenlet


@dataclass(eq=False)
class Process:
    """A job's process on a node. `threads`: what of it runs."""

    node: int
    number: int
    alive: bool = True
    still_until_s: float = 0.0
    at_work: str = ""
    job: tuple | None = None
    threads: list[greenlet] = field(default_factory=list)
    seen: dict = field(default_factory=dict)
    heart: object = None


class Clock:
    """Whose turn it is, and when. Stands in for the modules `time` and `threading` where the project's code uses them."""

    def __init__(self, dice: random.Random):
        self.now_s, self.dice, self.over = 0.0, dice, False
        self._queue, self._count, self._due, self._of, self._loop = [], 0, {}, {}, getcurrent()

    def process(self) -> Process | None:
        """Whose turn it is."""
        return self._of.get(getcurrent())

    def spawn(self, process: Process, work: Callable[[], object]) -> greenlet:
        thread = greenlet(work, parent=self._loop)
        self._of[thread] = process
        process.threads.append(thread)
        self.wake(thread, self.now_s)
        return thread

    def at(self, when_s: float, call: Callable[[], object]):
        self._count += 1
        heapq.heappush(self._queue, (when_s, self._count, call))

    def wake(self, thread: greenlet, when_s: float):
        """Only the last word counts: what is woken early is not woken again when it would have been."""
        self.at(when_s, thread)
        self._due[thread] = self._count

    def interrupt(self, process: Process, error: BaseException):
        """As a signal's handler that raises in the main thread."""
        self._due.pop(process.threads[0], None)
        process.threads[0].throw(error)

    def run(self):
        """Until nothing is left to happen."""
        while self._queue:
            self.now_s, count, what = heapq.heappop(self._queue)
            if not isinstance(what, greenlet):
                what()
            elif self._due.get(what) == count and self._of[what].alive:
                if self._of[what].still_until_s > self.now_s:
                    self.wake(what, self._of[what].still_until_s)
                else:
                    what.switch()

    # as `time`
    def monotonic(self) -> float:
        return self.now_s

    time = monotonic

    def sleep(self, seconds: float):
        thread = getcurrent()
        if thread in self._of and not self.over:
            self.wake(thread, self.now_s + seconds)
            self._loop.switch()

    # as `threading`
    def Thread(self, target, name="", daemon=True) -> _Thread:
        return _Thread(self, target)

    def Event(self) -> _Event:
        return _Event(self)

    Lock = nullcontext


class _Event:
    def __init__(self, clock: Clock):
        self._clock, self._set, self._waiting = clock, False, None

    def set(self):
        self._set = True
        if self._waiting:
            self._clock.wake(self._waiting, self._clock.now_s)

    def wait(self, timeout: float) -> bool:
        self._waiting = getcurrent()
        if not self._set:
            self._clock.sleep(timeout)
        self._waiting = None
        return self._set


class _Thread:
    def __init__(self, clock: Clock, target):
        self._clock, self._target = clock, target

    def start(self):
        self._thread = self._clock.spawn(self._clock.process(), self._target)

    def join(self):
        while not self._thread.dead and not self._clock.over:
            self._clock.sleep(0.001)

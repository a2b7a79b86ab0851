"""Decoders that are not ours, in a process that may die: a file that brings its codec down is a file that is not read, and the run goes on.

Against accidents and malformed files. It is no sandbox: the child has its user's rights.
"""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection

CPU_S = 60  # of one call; the largest film takes a few. Processor time, not the clock: a busy machine rejects nothing
MEMORY = 8 << 30  # bytes beyond what the child has when it starts; the largest film that is legal takes about 3 GiB
BY_INPUT = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGPROF}


class Died(Exception):
    """The call's input brought the child down; the message says how."""


class Contained:
    """A child process that makes calls, one after the other; it starts with the first. Use as a context manager."""

    def __init__(self, memory: int = MEMORY, cpu_s: float = CPU_S):
        self._limits, self._process, self._end = (memory, cpu_s), None, None

    def __enter__(self) -> Contained:
        return self

    def __exit__(self, *_):
        if self._process:
            self._end.close()
            self._process.join()
            self._process = None

    def call(self, function: Callable, *arguments):
        """`function(*arguments)` there -> its value, or its exception. All of it has to be picklable.

        Died where the input brought the child down; RuntimeError where something else did, and another try may do.
        """
        if not self._process:
            self._start()
        try:
            self._end.send((function, arguments))
            value, error = self._end.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if error is not None:
            raise error
        return value

    def _start(self):
        spawn = multiprocessing.get_context("spawn")  # a fork would take over locks that other threads hold
        self._end, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, *self._limits), daemon=True)
        self._process.start()
        theirs.close()

    def _death(self) -> Exception:
        self._end.close()
        self._process.join()
        code, self._process = self._process.exitcode, None
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        if -code == signal.SIGPROF:
            return Died(f"its decoder took more than {self._limits[1]:g} s of processor time")
        if -code in BY_INPUT:
            return Died(f"its decoder ended by {how}")
        return RuntimeError(f"the process that decodes ended by {how}: out of memory, or stopped from outside")


def _serve(end: Connection, memory: int, cpu_s: float):
    for ours in (signal.SIGINT, signal.SIGUSR2):  # Ctrl-C, and SLURM's word before a time limit, are for the parent
        signal.signal(ours, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limited = False
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        if not limited:  # the decoder has been imported
            _limit(memory)
            limited = True
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # its signal, which nobody catches, ends the process
        try:
            answer = function(*arguments), None
        except Exception as error:
            answer = None, error
        signal.setitimer(signal.ITIMER_PROF, 0)
        end.send(answer)


def _limit(memory: int):
    with open("/proc/self/statm") as sizes:
        most = int(sizes.read().split()[0]) * resource.getpagesize() + memory
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))

"""A polite end. USR2 or TERM asks whatever is at work to save and stop; whoever started it decides what then (requeue, or nothing).

A training loop stops after the step it is at, with a checkpoint. Anything else has nothing to keep and stops at once: it is done again, whole.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
asked = threading.Event()
asked_by: int | None = None  # the signal that asked: the first one, but USR2 says more than TERM, which may precede it
_listening, _patient = False, 0


class Interrupted(BaseException):
    """Somebody asked for an end. No error of the unit's: like KeyboardInterrupt it passes every `except Exception`."""


def listen():
    """From now on `SIGNALS` ask this process to stop. Main thread only."""
    global _listening
    _listening = True
    for number in SIGNALS:
        signal.signal(number, _ask)


def stop_listening():
    """`SIGNALS` end this process, as they do any other."""
    global _listening
    _listening = False
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def listen_again():
    """After a library has taken the signals for itself."""
    if _listening:
        listen()


def _ask(number: int, frame):
    global asked_by
    asked_by = signal.SIGUSR2 if signal.SIGUSR2 in (asked_by, number) else number
    asked.set()
    if not _patient:
        raise Interrupted(signal.Signals(number).name)


def check():
    """Interrupted, if somebody asked."""
    if asked.is_set():
        raise Interrupted("asked to stop")


def wait_for(number: int, most_s: float) -> bool:
    """Whether that signal asked too, within `most_s`. For whoever has stopped already."""
    until = time.monotonic() + most_s
    with patiently():
        while asked_by != number and time.monotonic() < until:
            time.sleep(0.2)
    return asked_by == number


@contextmanager
def patiently() -> Iterator[None]:
    """Inside, being asked raises nothing: the code looks at `asked` where it can stop."""
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1

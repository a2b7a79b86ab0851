"""What a unit costs: processor time, wall time and memory of the attempt that finished it."""

from __future__ import annotations

import os
import resource
import time
from contextlib import suppress

from jobs import world

PEAK = "VmHWM:"  # Linux: the largest resident set since the mark was last reset


class Meter:
    """Counts from its making. One unit at a time is at work in a process, so what the process used meanwhile is the unit's."""

    def __init__(self):
        self._wall_s, self._core_s = time.monotonic(), _core_s()
        world.give_memory_back()  # or what the unit before has kept would count as this one's
        with suppress(OSError):  # elsewhere the peak is that of the process's whole life
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("5")

    def read(self, ranks: int = 1) -> dict[str, float]:
        """Wall `seconds`; `core_seconds` of this process and of the children it has waited for; `peak_gb` of its largest process."""
        peak = _peak_bytes() if ranks == 1 else _scale() * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        return {
            "seconds": round(time.monotonic() - self._wall_s, 3),
            "core_seconds": round(_core_s() - self._core_s, 3),
            "peak_gb": round(peak / 1e9, 3),
        }


def _core_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _scale() -> int:
    return 1 if os.uname().sysname == "Darwin" else 1024  # of ru_maxrss, in bytes


def _peak_bytes() -> int:
    with suppress(OSError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(PEAK):
                return int(line.split()[1]) * 1024
    return _scale() * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

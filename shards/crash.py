"""Named instants of the commit path at which a test or a chaos run may do this process harm.

Nothing happens unless the environment asks: `VHS_CRASH_AT=name` ends the process by SIGKILL at its first passage of that window, `name:3` at its third,
`name:3=enospc` does another of HARMS there; several stand with commas between. SIGKILL and not an exception: no handler, no `finally`, no flush runs,
which is what a lost node or a preempted job leaves. `VHS_CRASH_LOG`, a file, is told of a harm before it is done.
"""

from __future__ import annotations

import errno
import os
import re
import signal
from collections import Counter
from functools import cache

WINDOWS = (  # what is there at that instant
    "claim",  # a claim of this attempt, nothing else of the unit
    "write-begun",  # an empty file under an invisible name; in an object store nothing
    "name-made",  # a name with all its bytes, of which the one who made it has not been told
    "tar-half-written",  # half a tar in the attempt's scratch, nothing in the storage
    "tar-before-sidecar",  # the whole tar in the storage, named by no sidecar: an orphan
    "sidecar-written-not-linked",  # the tar, and the sidecar's bytes as an invisible temporary
    "files-before-marker",  # every file of a unit that writes no shard, without its marker
    "checkpoint-half-written",  # half a checkpoint beside the last complete one
    "training-step",  # whatever the last checkpoint holds; steps since then are lost
    "round-before-commit",  # the labels a round's list is computed from, without the list
    "table-written-not-linked",  # a table of splits, labels or predictions as an invisible temporary
    "report-half-written",  # some of the report's files, without its marker
    "plan-before-commit",  # an empty or foreign run folder, without plan.json
    "claim-not-dropped",  # the product, and the claim of the attempt that made it
)
HARMS = {  # kill -9; asked to stop, by a scheduler in either way; standing still as a node that swaps; a full disk; a bad one
    "kill": signal.SIGKILL, "term": signal.SIGTERM, "usr2": signal.SIGUSR2, "stop": signal.SIGSTOP, "enospc": errno.ENOSPC, "eio": errno.EIO,
}  # fmt: skip
_passages: Counter[str] = Counter()


def window(name: str) -> None:
    """Pass the window `name`; the harm is done here if VHS_CRASH_AT says so. ValueError for a name, given or asked for, not in WINDOWS."""
    if name not in WINDOWS:
        raise ValueError(f"no crash window is called {name!r}; legal: {', '.join(WINDOWS)}")
    wanted = os.environ.get("VHS_CRASH_AT")
    if not wanted:
        return
    harms = _read(wanted)
    _passages[name] += 1
    if harm := harms.get((name, _passages[name])):
        log(name, harm)
        if isinstance(HARMS[harm], signal.Signals):
            os.kill(os.getpid(), HARMS[harm])
        else:
            raise OSError(HARMS[harm], f"{os.strerror(HARMS[harm])} (asked for by VHS_CRASH_AT)")


def log(where: str, what: str) -> None:
    """A line in the file VHS_CRASH_LOG, if the environment names one: where, what, whose process. Whole, among those of other processes."""
    if file := os.environ.get("VHS_CRASH_LOG"):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(descriptor, f"{where} {what} {os.getpid()}\n".encode())
        os.close(descriptor)


@cache
def _read(wanted: str) -> dict[tuple[str, int], str]:
    harms = {}
    for one in wanted.split(","):
        said = re.fullmatch(r"([a-z-]+)(?::([1-9]\d*))?(?:=([a-z0-9]+))?", one)
        if not said or said[1] not in WINDOWS or (said[3] or "kill") not in HARMS:
            legal = f"NAME, NAME:N or NAME:N=HARM with N >= 1, NAME one of {', '.join(WINDOWS)}, HARM one of {', '.join(HARMS)}"
            raise ValueError(f"VHS_CRASH_AT={wanted!r}: want {legal}")
        harms[said[1], int(said[2] or 1)] = said[3] or "kill"
    return harms

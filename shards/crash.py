"""Named instants of the commit path at which a test or a chaos run may kill this process.

Nothing happens unless the environment asks: `VHS_CRASH_AT=name` ends the process by SIGKILL at its first passage of that window, `name:3`
at its third. SIGKILL and not an exception: no handler, no `finally`, no flush runs, which is what a lost node or a preempted job leaves.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

WINDOWS = (  # what is on disk at that instant
    "claim",  # a claim of this attempt, nothing else of the unit
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
)
_passages: Counter[str] = Counter()


def window(name: str) -> None:
    """Pass the window `name`; the process ends here if VHS_CRASH_AT says so. ValueError for a name, given or asked for, not in WINDOWS."""
    if name not in WINDOWS:
        raise ValueError(f"no crash window is called {name!r}; legal: {', '.join(WINDOWS)}")
    wanted = os.environ.get("VHS_CRASH_AT")
    if not wanted:
        return
    target, _, passage = wanted.partition(":")
    if target not in WINDOWS or not (passage or "1").isdecimal() or passage == "0":
        raise ValueError(f"VHS_CRASH_AT={wanted!r}: want NAME or NAME:N with N >= 1 and NAME one of {', '.join(WINDOWS)}")
    _passages[name] += 1
    if name == target and _passages[name] == int(passage or 1):
        os.kill(os.getpid(), signal.SIGKILL)

"""The run of `vhs chaos`: its plan, units, claims, attempts, commits and rounds are those of every run; of each unit's work something small takes the place.

A product is a function of the unit's parameters and of the digests of its inputs, so whatever is lost or doubled on the way shows in every byte after it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jobs import interrupt, plan, stages
from jobs.config import load
from jobs.drive import Failed, drive
from jobs.unit import Files, Shard, Table, digest
from shards import crash
from shards.objects import Objects
from shards.posix import Posix
from shards.sample import Sample
from vhs.measure import CLASSES

REQUEST_S = 2  # an object store's answer may take
HASTE = ("execution.heartbeat_s=0.2", "execution.stale_s=1.5")
SETTINGS = (  # what makes a run of some fifty units out of debug/demo
    "phantoms.count=64", "ingest.shard_images=8", "generation.unit_images=8", "generation.round_units=2", "generation.max_rounds=3", "generation.quota=40",
    "seeds=[0,1]", "dreambooth.steps=12", "execution.checkpoint_steps=3", *HASTE,
)  # fmt: skip
ROWS, STEP_S = 8, 0.01
FACTS = {"images": ROWS, "rejects": [], "sources": ["clinic"], "patients_seen": [], "classes": {}, "accepted": dict.fromkeys(CLASSES, 2)}


def work(out: str, pipeline: bool, settings: Sequence[str] = ()):
    """A worker: goes on with the run at `out` until it is complete, or until harm comes. `pipeline`: debug/demo itself; `settings`: over those here. What it
    says goes to CHAOS_SAID."""
    said = os.open(os.environ["CHAOS_SAID"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(said, 1)
    os.dup2(said, 2)
    for kind in (Posix, Objects):
        kind.commit = _told(kind.commit)
    if not pipeline:
        have_nothing_to_do()
    interrupt.listen()
    try:
        drive(plan.start(load("debug/demo", [*(HASTE if pipeline else SETTINGS), *settings]), out))
    except (Failed, OSError, interrupt.Interrupted) as error:
        raise SystemExit(f"{os.environ.get('VHS_CRASH_AT', '')}: {type(error).__name__}: {error}") from None


def have_nothing_to_do():
    """From now on the stages have something small to do in this process."""
    for stage in stages.STAGES:
        stage.work, stage.TORCH = partial(_work, stage), False


def _told(commit):
    """`commit`, which says in CHAOS_COMMITS what it made: a name that two calls have made was not committed once."""

    def telling(storage, path, data, **options):
        created = commit(storage, path, data, **options)
        if created:
            descriptor = os.open(os.environ["CHAOS_COMMITS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.write(descriptor, f"{path}\n".encode())
            os.close(descriptor)
        return created

    return telling


def _work(stage, config, inputs, output) -> Files | Shard | Table:
    seed = digest([stage.NAME, inputs.params, {role: [m.sha256 for m in inputs.markers(role)] for role in sorted(inputs._unit.inputs)}])
    if stage.KIND == "json":
        _steps(config, output, seed)
        return _files(stage, output.folder, seed)
    if stage.NAME == "label":
        return Table(_columns(seed, inputs.samples("shard")["key"].tolist()), FACTS)
    count = len(inputs.params["sources"]) if stage.NAME == "ingest" else config.generation.unit_images if stage.NAME == "generate" else ROWS
    return _shard(seed, count) if stage.NAME in ("ingest", "priors", "generate") else Table(_columns(seed, _keys(seed, count)), FACTS)


def _steps(config, output, seed: str):
    """A training: its state is a function of the steps done, its checkpoints are a run's."""
    total = config.dreambooth.steps
    state = output.progress.resume() or {"step": 0, "sum": seed}
    for step in range(state["step"] + 1, total + 1):
        time.sleep(STEP_S)
        state = {"step": step, "sum": hashlib.sha256(state["sum"].encode()).hexdigest()}
        output.progress.step(step, total, {}, lambda state=state: dict(state))
    (output.folder / "weights.json").write_text(json.dumps(state))


def _files(stage, folder: Path, seed: str) -> Files:
    (folder / "lineage.json").write_text(json.dumps({"keys_seen": [seed[:16]], "patients_seen": []}))
    if stage.NAME == "report":
        (folder / "summary.json").write_text(json.dumps({"seed": seed}))
        crash.window("report-half-written")
        (folder / "index.html").write_text(seed)
    return Files(FACTS)


def _shard(seed: str, count: int) -> Shard:
    """`count` images of 16 x 16 pixels."""
    import numpy as np

    from vhs.radiograph import encode_png

    noise = np.random.Generator(np.random.Philox(int(seed[:16], 16)))
    samples = (Sample(key, {"png": encode_png(noise.integers(0, 256, (16, 16), np.uint8))}) for key in _keys(seed, count))
    return Shard(samples, _columns(seed, _keys(seed, count)).drop_columns("key"), {**FACTS, "images": count})


def _columns(seed: str, keys: list[str]):
    import pyarrow as pa

    return pa.table({"key": keys, "number": pa.array(range(len(keys)), pa.int64()), "made_of": [seed[:16]] * len(keys)})


def _keys(seed: str, count: int) -> list[str]:
    return [hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:16] for number in range(count)]

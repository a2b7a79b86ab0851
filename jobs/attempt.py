"""One attempt at one unit: claim, prepare, work, commit. The same on every backend."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from jobs import world
from jobs.claim import Claim, Superseded, owner
from jobs.config import Config
from jobs.unit import Marker, Unit, commit, digest, read_marker
from shards import crash, manifest
from shards.storage import TEMPORARY, Storage, open_storage

Watch = Callable[[str, int, int, dict], None]  # (unit path, step, total steps, metrics): for a progress display in the same process


class Inputs:
    """What a unit may look at: its parameters and the committed units it names. `role` is a key of Unit.inputs."""

    def __init__(self, storage: Storage, unit: Unit):
        self.storage, self.params, self._unit = storage, unit.params, unit

    def markers(self, role: str) -> list[Marker]:
        return [read_marker(self.storage, path) for path, _ in self._unit.inputs.get(role, ())]

    def facts(self, role: str) -> dict:
        """The facts of a role played by one unit."""
        return self.markers(role)[0].facts

    def folder(self, role: str) -> Path:
        """The files of a role played by one unit, as a local folder."""
        return self.storage.local(self.markers(role)[0].folder)

    def samples(self, role: str) -> pd.DataFrame:
        """The manifest of the shards that a role's units made, in order; `path` is where an image's shard is."""
        return manifest.load(self.storage, paths=[path for path, _ in self._unit.inputs.get(role, ())]).to_pandas()

    def table(self, role: str) -> pd.DataFrame:
        """The rows of the tables that a role's units made, in order."""
        tables = [manifest.read(self.storage, path).to_pandas() for path, _ in self._unit.inputs.get(role, ())]
        return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


@dataclass
class Output:
    """Where a unit writes and to whom it reports. `folder` is private to the attempt; what is in it is committed only with the product."""

    folder: Path
    progress: Progress


class Progress:
    """vhs.checkpoint.Progress on a run: checkpoints in storage, crash windows, and word of each step."""

    def __init__(self, storage: Storage, unit: Unit, config: Config, claim: Claim | None, scratch: Path, watch: Watch | None):
        self._storage, self._unit, self._claim, self._scratch, self._watch = storage, unit, claim, scratch, watch
        self._every, self._folder = config.execution.checkpoint_steps, f"checkpoints/{unit.identity}/"

    def resume(self) -> dict | None:
        from vhs import checkpoint

        names = self._storage.list(self._folder)
        return checkpoint.load(self._storage.local(names[-1])) if names else None

    def step(self, step: int, total: int, metrics: dict[str, float], capture: Callable[[], dict]):
        crash.window("training-step")
        if self._claim:
            self._claim.check()
            self._claim.message = {"step": step, "total": total, **metrics}
        if self._watch:
            self._watch(self._unit.path, step, total, metrics)
        if world.rank() == 0 and step % self._every == 0 and step < total:
            self._save(step, capture())

    def _save(self, step: int, state: dict):
        """The newest checkpoint replaces the older ones once it is whole."""
        from vhs import checkpoint

        file = self._scratch / "checkpoint.pt"
        checkpoint.save(state, file)
        older = self._storage.list(self._folder)
        self._storage.commit(f"{self._folder}{step:08d}.pt", file, crash_window="checkpoint-half-written")
        for name in older:
            self._storage.delete(name)


def attempt(url: str, config: Config, unit: Unit, watch: Watch | None = None) -> str:
    """Do `unit` unless somebody else does. -> "done" | "busy". An error is recorded in state/failures and raised."""
    storage = open_storage(url)
    execution = config.execution
    claim = Claim.take(storage, unit.identity, heartbeat_s=execution.heartbeat_s, stale_s=execution.stale_s)
    if claim is None:
        return "busy"
    with claim:
        if storage.exists(unit.marker):  # finished and its claim dropped between our listing and our claim
            return "done"
        try:
            if unit.ranks > 1 and world.size() == 1:
                world.launch(unit.ranks, work, url, config, unit)
            else:
                work(url, config, unit, claim, watch)
        except Superseded:
            return "busy"
        except Exception:
            storage.put(f"state/failures/{unit.identity}.txt", f"{unit.stage} {unit.path}\n{traceback.format_exc()}".encode())
            raise
        for name in [*storage.list(f"checkpoints/{unit.identity}/"), f"state/failures/{unit.identity}.txt"]:
            storage.delete(name)
    return "done"


def work(url: str, config: Config, unit: Unit, claim: Claim | None = None, watch: Watch | None = None):
    """One rank's part of a unit; rank 0 commits. Everything random in it is seeded by the unit, so a second attempt makes the same product."""
    from jobs.stages import BY_NAME

    storage = open_storage(url)
    stage = BY_NAME[unit.stage]
    if stage.TORCH:
        world.set_numerics(config.threads)
    scratch = _scratch(storage, config, unit)
    try:
        began = time.monotonic()
        output = Output(scratch / "out", Progress(storage, unit, config, claim, scratch, watch))
        output.folder.mkdir()
        product = stage.work(config, Inputs(storage, unit), output)
        if world.rank() == 0:
            if claim:
                claim.check()
            if commit(storage, unit, product, output.folder):
                about = {**owner(), "stage": unit.stage, "unit": unit.path, "seconds": round(time.monotonic() - began, 3)}
                storage.put(f"state/done/{unit.identity}.json", json.dumps(about).encode())
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _scratch(storage: Storage, config: Config, unit: Unit) -> Path:
    """A private folder for this attempt. On one rank, what killed attempts at the unit left behind goes: the claim says they are dead."""
    chosen = config.execution.work_dir
    root = Path(chosen).expanduser() / digest(storage.url)[:12] if chosen else storage.root / TEMPORARY / "work"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    if world.size() == 1:
        for left in root.glob(f"{unit.identity}-*"):
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{unit.identity}-", dir=root))

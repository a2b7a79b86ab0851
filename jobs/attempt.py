"""One attempt at one unit: claim, prepare, work, commit. The same on every backend."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from jobs import accounting, failures, interrupt, world
from jobs.claim import Claim, dead, machine, overtaken, owner
from jobs.config import Config
from jobs.cost import Meter
from jobs.gang import Gang
from jobs.logbook import Logbook
from jobs.unit import Marker, Unit, commit, digest, read_marker
from shards import crash, manifest
from shards.storage import Storage, open_storage

UNTOUCHED_S = 3 * 24 * 3600  # scratch of another machine: a training writes its checkpoints there
HEAR_S = 0.5  # between two looks at what rank 0 says of its steps
Watch = Callable[[str, int, int, dict], None]  # (unit path, step, total steps, metrics): for a progress display on the same machine


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
    logbook: Logbook


class Progress:
    """vhs.checkpoint.Progress on a run: checkpoints in storage, crash windows, and word of each step."""

    def __init__(self, storage: Storage, unit: Unit, config: Config, claim: Claim, scratch: Path, watch: Watch | None, logbook: Logbook):
        self._storage, self._unit, self._claim, self._scratch, self._watch, self._logbook = storage, unit, claim, scratch, watch, logbook
        self._every, self._folder = config.execution.checkpoint_steps, f"checkpoints/{unit.identity}/"
        self.patience, self._stepping = ExitStack(), False

    def resume(self) -> dict | None:
        from vhs import checkpoint

        while names := self._storage.list(self._folder):
            try:
                return checkpoint.load(self._storage.local(names[-1]))
            except FileNotFoundError:  # an overtaken attempt replaced it since the listing
                continue
        return None

    def step(self, step: int, total: int, metrics: dict[str, float], capture: Callable[[], dict]):
        crash.window("training-step")
        if not self._stepping:  # from now on there is something to keep: being asked to stop waits for the end of a step
            self._stepping = True
            self.patience.enter_context(interrupt.patiently())
        self._claim.check()
        self._claim.message = {"step": step, "total": total, **metrics}
        if self._watch:
            self._watch(self._unit.path, step, total, metrics)
        if world.rank() == 0:
            self._logbook.scalars(step, metrics)
        stop = world.on_any_rank(interrupt.asked.is_set()) and step < total
        if stop or (step % self._every == 0 and step < total):
            state = capture()  # on every rank: each may hold a share of it
            if world.rank() == 0:
                self._save(step, state)
        if stop:
            raise interrupt.Interrupted(f"asked to stop, saved at step {step} of {total}")

    def _save(self, step: int, state: dict):
        """The newest checkpoint replaces the older ones once it is whole; those of an attempt that is further stay."""
        from vhs import checkpoint

        file, name = self._scratch / "checkpoint.pt", f"{self._folder}{step:08d}.pt"
        checkpoint.save(state, file)
        self._storage.commit(name, file, crash_window="checkpoint-half-written")
        for older in (other for other in self._storage.list(self._folder) if other < name):
            self._storage.delete(older)


def attempt(url: str, config: Config, unit: Unit, watch: Watch | None = None, gang: Gang | None = None) -> str:
    """Do `unit` unless somebody else does. -> "done" | "busy". An error is recorded in state/failures and raised. Several ranks run on the
    machines of `gang`, of which this is the leader, or all here."""
    storage, execution = open_storage(url), config.execution
    claim = Claim.take(storage, unit.identity, heartbeat_s=execution.heartbeat_s, stale_s=execution.stale_s)
    if claim is None:
        return "busy"
    with claim:
        if storage.exists(unit.marker):  # finished and its claim dropped between our listing and our claim
            return "done"
        # a job that nobody watches gives up at last; a start by hand counts anew
        if owner()["job"] and (failure := accounting.judge(storage, unit, claim.before, execution.tries)):
            claim.withdraw()
            raise RuntimeError(f"{failure.reason}, on {failure.node}, at the last of {failure.tries} tries")
        meter = Meter()
        try:
            if unit.ranks > 1 or unit.apart:
                launch = gang.launch if gang else partial(world.launch, unit.ranks)
                with _steps_of_rank_0(_scratch(storage, config, unit), claim, unit, watch) as said:
                    committed = launch(as_rank, url, unit, config.model_dump(mode="json"), claim.attempt, said)
            else:
                committed = _work(storage, config, unit, claim, watch)
        except Exception as error:
            if overtaken(storage, unit.identity, claim.attempt):
                return "busy"
            failures.record(storage, unit, error)
            raise
        if committed:
            tell_done(storage, unit, meter)
        for name in storage.list(f"checkpoints/{unit.identity}/"):
            storage.delete(name)
        failures.forget(storage, unit.identity)
    return "done"


def tell_done(storage: Storage, unit: Unit, meter: Meter):
    """Take down who did `unit`, and what it cost: for people, and to tell the pace."""
    about = {**owner(), "stage": unit.stage, "unit": unit.path, "ended_s": time.time(), **meter.read(unit.ranks)}
    storage.put(f"state/done/{unit.identity}.json", json.dumps(about).encode(), durable=False)


@contextmanager
def _steps_of_rank_0(folder: Path, claim: Claim, unit: Unit, watch: Watch | None) -> Iterator[str]:
    """A file in `folder`, in which rank 0, another process of this machine, says each step: for the claim's beats, and for who watches."""
    over, before, file = threading.Event(), "", folder / "step.json"

    def listen():
        nonlocal before
        while not over.wait(HEAR_S):
            with suppress(FileNotFoundError):
                if (said := file.read_text()) != before:
                    before, word = said, json.loads(said)
                    claim.message = word
                    if watch:
                        watch(unit.path, word["step"], word["total"], {name: word[name] for name in word if name not in ("step", "total")})

    listener = threading.Thread(target=listen, name="steps", daemon=True)
    listener.start()
    try:
        yield str(file)
    finally:
        over.set()
        listener.join()
        shutil.rmtree(folder, ignore_errors=True)


def as_rank(url: str, unit: Unit, settings: dict, number: int, said: str) -> bool:
    """One of several ranks: the claim is its leader's, whose heart beats; this process only looks whether it still holds. Rank 0 says its steps in `said`."""
    storage, config = open_storage(url), Config.model_validate(settings)

    def watch(_: str, step: int, total: int, metrics: dict):
        aside = Path(f"{said}.part")
        aside.write_text(json.dumps({"step": step, "total": total, **metrics}))
        aside.replace(said)  # whole whenever it is read

    claim = Claim(storage, unit.identity, number, config.execution.heartbeat_s, beating=False)
    return _work(storage, config, unit, claim, watch if world.rank() == 0 else None)


def _work(storage: Storage, config: Config, unit: Unit, claim: Claim, watch: Watch | None) -> bool:
    """One rank's part of a unit; rank 0 commits -> whether this call did. Everything random in it is seeded by the unit, so a second attempt makes
    the same product."""
    from jobs.stages import BY_NAME

    stage = BY_NAME[unit.stage]
    if stage.TORCH:
        world.set_numerics(config.threads)
    scratch, logbook = _scratch(storage, config, unit), Logbook(storage, unit, config.execution.tensorboard)
    output = Output(scratch / "out", Progress(storage, unit, config, claim, scratch, watch, logbook), logbook)
    try:
        output.folder.mkdir()
        product = stage.work(config, Inputs(storage, unit), output)
        claim.check()
        return world.rank() == 0 and commit(storage, unit, product, output.folder)
    finally:
        output.progress.patience.close()
        logbook.close()
        shutil.rmtree(scratch, ignore_errors=True)


def sweep_scratch(root: Path, machines: str = "*"):
    """Of other `machines`, whose processes nobody here can ask: what stood untouched so long that no attempt is behind it."""
    for folder in (folder for folder in root.glob(machines) if folder.name != machine()):
        changed = [path.lstat().st_mtime for path in (folder, *folder.rglob("*")) if path.is_symlink() or path.exists()]
        if time.time() - max(changed, default=0.0) > UNTOUCHED_S:
            shutil.rmtree(folder, ignore_errors=True)


def _scratch(storage: Storage, config: Config, unit: Unit) -> Path:
    """A private folder for this attempt, under this machine's name: there, what dead processes left behind can be told and goes."""
    chosen = os.path.expandvars(config.execution.work_dir or os.environ.get("VHS_WORK_DIR", ""))
    if "$" in chosen:
        raise RuntimeError(f"work_dir {chosen}: this machine has no such variable; name one that it has, or a folder")
    root = Path(chosen).expanduser() / digest(storage.url)[:12] if chosen else storage.work
    (root / machine()).mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in (root / machine()).glob("*-*-*"):
        _, pid, started = left.name.split("-")
        if dead({"machine": machine(), "pid": int(pid), "started": started}):
            shutil.rmtree(left, ignore_errors=True)
    sweep_scratch(root, f"{socket.gethostname()}-*")  # of this host before it was booted anew: no more, for a listing of all is dear on a thousand nodes
    me = owner()
    folder = root / machine() / f"{unit.identity}-{me['pid']}-{me['started']}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder

"""A run: its folder, its frozen plan, and what is committed in it.

plan.json freezes the science at the first start. A later start with other science is refused, naming the keys and the stages they would
invalidate; execution settings may differ every time. Everything a run knows is in its folder: there is no other state.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from functools import cached_property, reduce
from importlib.metadata import version

from jobs import models
from jobs.config import PHANTOMS, Config, changed
from jobs.data import place
from jobs.unit import Marker, Unit, read_marker
from shards.storage import Storage, open_storage
from vhs.arms import differences

FORMAT = 3  # of a run folder
STARTED = "state/execution.json"  # how the run was last started: where its data lies, its execution settings, an elastic run's ranks
SOURCES = "real/sources.json"
CORRECTIONS, CONFIRMED = "labels/corrections", "labels/confirmed"  # a person's words (jobs/labels.py), which nobody could make again
LAST = chr(0x10FFFF)  # after every character of a name


class PlanError(Exception):
    """This start does not fit the run that is there; the message says why and the way on."""


class Run:
    """An open run folder. Which names there are, and so which units, is remembered until `refresh()`. What cannot change is kept: markers, and the
    units made of them."""

    def __init__(self, url: str, config: Config, read_only: bool = False):
        self.only_scope: str | None = None  # work and look at this scope alone; the report needs them all
        self.url, self.config, self.storage, self._read_only = str(url), config, open_storage(url), read_only
        self._markers: dict[str, Marker] = {}
        self._sha256: dict[str, str] = {}  # of markers: naming a unit takes those of its inputs and nothing else
        self._made: dict[tuple, Unit] = {}
        self._outside: dict[str, dict] = {}
        self._science: dict[tuple[str, ...], dict] = {}
        self._at_work: dict = {}  # names of what decides on units, and by stage the units up to those at work
        self.refresh()

    @property
    def analysis(self) -> dict:
        """What will be said, fixed before anything is trained."""
        config = self.config
        return {
            "purpose": config.purpose,
            "primary_endpoint": "accuracy(mixed) - accuracy(real-matched) on the test split, paired, 95% interval over patients and trainings",
            "arms": list(config.arms),
            "seeds": list(config.seeds),
            "folds": config.split.folds,
            "differences": [" - ".join(pair) for pair in differences(config.arms)],
            "looks": 1,
        }

    @property
    def scopes(self) -> list[str]:
        """The experiments whose units are named: all of the plan's, or `only_scope`. PlanError for one that the plan does not have."""
        from vhs.split import scopes

        planned = scopes(self.config.split)
        if self.only_scope is None:
            return planned
        if self.only_scope not in planned:
            raise PlanError(f"{self.url} has no scope {self.only_scope!r}; its scopes are {', '.join(planned)}")
        return [self.only_scope]

    @cached_property
    def sources(self) -> list[dict]:
        """What there is to ingest, as it was found when the run began."""
        from jobs.stages import ingest

        return ingest.sources(self.config)

    def outside(self, name: str, scope: str) -> dict:
        """The set of a generator outside of the run, as it was found when the run began (jobs/outside.py)."""
        from jobs import outside

        if (path := outside.path(name, scope)) not in self._outside:
            self._outside[path] = self.freeze(path, lambda: outside.found(self.config, name, scope, self.sources))
        return self._outside[path]

    def refresh(self):
        """See what has been committed since: one listing. The units stay as they are while those at work are not all done and nobody has listed a
        round or corrected a label: a thousand workers that wait for the last ones name nothing anew."""
        self._listing = self.storage.list()
        self.names = set(self._listing)
        named: dict[str, list[Unit]] = self._at_work.get("named", {})
        *_, last = named.values() or [[]]
        stays = self._at_work.get("decided") == self._decisions and not all(map(self.done, last))
        self._units = dict(named) if stays else {}
        self._finished = set(list(named)[:-1]) if stays else set()  # stages

    @property
    def _decisions(self) -> list[str]:
        return self.under("rounds/") + self.under(f"{CORRECTIONS}/")

    def units(self, stage: str) -> list[Unit]:
        """The units of a stage that can be named now: its module says which, from what is committed."""
        from jobs.stages import BY_NAME

        if stage not in self._units:  # remembered until refresh()
            self._units[stage] = BY_NAME[stage].units(self)
        return self._units[stage]

    def named(self) -> Iterator[tuple[str, list[Unit]]]:
        """Every stage whose units can be named now, in order, with its units: up to the first that has work left."""
        from jobs.stages import STAGES

        named = {}
        for stage in STAGES:
            if self.only_scope and stage.NAME == "report":
                return
            named[stage.NAME] = units = self.units(stage.NAME)
            yield stage.NAME, units
            if stage.NAME not in self._finished and not all(map(self.done, units)):
                self._at_work.update(decided=self._decisions, named=named)
                return

    def committed(self, stage: str, **params) -> list[str]:
        """Markers of a stage's units, those with these parameters. Its units are all done: stages are asked in order."""
        return [unit.marker for unit in self.units(stage) if all(unit.params.get(name) == value for name, value in params.items())]

    def under(self, prefix: str) -> list[str]:
        """The names that start with `prefix`, sorted."""
        return self._listing[bisect_left(self._listing, prefix) : bisect_left(self._listing, prefix + LAST)]

    def done(self, unit: Unit) -> bool:
        return unit.marker in self.names

    def marker(self, path: str) -> Marker:
        if path not in self._markers:
            self._markers[path] = read_marker(self.storage, path)
        return self._markers[path]

    def sha256(self, path: str) -> str:
        """Of the marker at `path`."""
        if path not in self._sha256:
            self._sha256[path] = hashlib.sha256(self.storage.read(path)).hexdigest()
        return self._sha256[path]

    def science(self, keys: tuple[str, ...]) -> dict:
        """The settings named by `keys` ("section", "section.key" or a top-level value): what enters a unit's identity."""
        if keys not in self._science:
            science = self.config.science
            self._science[keys] = {key: reduce(dict.__getitem__, key.split("."), science) for key in keys}
        return self._science[keys]

    def unit(
        self, stage: str, path: str, inputs: dict[str, list[str]], *, params: dict | None = None, ranks: int = 1, apart: bool = False
    ) -> Unit:  # fmt: skip
        """A unit of `stage` whose inputs are the committed markers at the given paths."""
        from jobs.stages import BY_NAME

        made_of = (stage, path, *((role, *paths) for role, paths in inputs.items()))
        if made_of not in self._made:
            hashed = {role: tuple((path, self.sha256(path)) for path in paths) for role, paths in inputs.items()}
            module = BY_NAME[stage]
            self._made[made_of] = Unit(stage, path, module.KIND, self.science(module.SCIENCE), params or {}, hashed, ranks, apart)
        return self._made[made_of]

    def freeze(self, path: str, value: Callable[[], object], window: str | None = None):
        """The JSON value at `path`, computed by the first who asks and the same for everyone after. Read only: what would be committed."""
        if not self.storage.exists(path):
            data = json.dumps(value(), sort_keys=True, indent=1).encode()
            if self._read_only:
                return json.loads(data)
            self.storage.commit(path, data, crash_window=window)
        if path not in self.names:
            self.names.add(path)
            insort(self._listing, path)
        return json.loads(self.storage.read(path))


def start(config: Config, out: str, opened: Run | None = None) -> Run:
    """Open the run at `out`, freezing `config` as its plan if it is new. PlanError when the science differs from the frozen plan's.

    `opened`: this very run, where its data have been looked at already.
    """
    from jobs import outside

    run, found = opened or Run(out, config), {}
    if "plan.json" not in run.names:
        found = outside.lists(run)
        plan = {
            "sources": len(run.sources),  # data that cannot be read is found out before anything is frozen
            "format": FORMAT,
            "vhs": version("vhs"),
            "science": config.science,
            "models": models.fingerprints(config),
            "analysis": run.analysis,
        } | ({"generators": outside.digests(found)} if found else {})
        run.storage.prove()
        run.storage.commit("plan.json", json.dumps(plan, sort_keys=True, indent=1).encode(), crash_window="plan-before-commit")
    check(config, out)
    outside.settle(run, read_plan(out).get("generators", {}), started(run.storage).get("generators", {}), found)
    run.storage.sweep(older_than_s=24 * 3600)
    now = {"data": place(config.data)} | ({"generators": places} if (places := outside.places(config)) else {})
    run.storage.put(STARTED, json.dumps(config.free | now, indent=1).encode())
    return run


def check(config: Config, out: str):
    """PlanError if the run at `out` was planned with other science than `config`'s."""
    plan = read_plan(out)
    if keys := changed(plan["science"], config.science):
        raise PlanError(_refusal(out, keys))
    _check_data(config, out)
    then, now = plan["models"], models.fingerprints(config)
    if other := [f"{name} was {then[name]}, is {now[name]}" for name in now if now[name] != then[name]]:
        raise PlanError(
            f"{out} began with other weights: {'; '.join(other)}. Put the former back (packaged ones came with vhs {plan['vhs']}), "
            f"or keep what is still valid: --out NEW --reuse {out}"
        )


def _check_data(config: Config, out: str):
    """PlanError if the data is looked for in another place than before, and is not the same there."""
    from jobs.stages import ingest

    storage = open_storage(out)
    if config.data == PHANTOMS or place(config.data) == started(storage).get("data") or not storage.exists(SOURCES):
        return
    then = {source["file"]: source for source in json.loads(storage.read(SOURCES))}
    now = {source["file"]: source for source in json.loads(json.dumps(ingest.sources(config)))}
    if other := sorted(file for file in then.keys() | now.keys() if then.get(file) != now.get(file)):
        raise PlanError(f"{config.data} holds other data than {out} began with, {len(other)} sources, {other[0]} first. {_refusal(out, ['data'])}")


def started(storage: Storage) -> dict:
    """How a run was last started; nothing where nobody knows, or where a power cut took the word."""
    try:
        return json.loads(storage.read(STARTED))
    except (FileNotFoundError, ValueError):
        return {}


def reopen(out: str, read_only: bool = False) -> Run:
    """The run at `out` with the plan and the execution settings it was last started with."""
    plan, storage = read_plan(out), open_storage(out)
    try:
        return Run(out, Config.of(plan["science"], started(storage)), read_only)
    except ValueError as error:
        raise PlanError(
            f"{out}: its plan does not fit this version of vhs ({version('vhs')}; planned with {plan['vhs']}): {error}"
        ) from None


def read_plan(out: str) -> dict:
    storage = open_storage(out)
    if not storage.exists("plan.json"):
        raise PlanError(f"{out} is not a run: it has no plan.json. Start one with: vhs run CONFIG --out {out}")
    plan = json.loads(storage.read("plan.json"))
    if plan["format"] != FORMAT:
        raise PlanError(f"{out} has format {plan['format']}, this version of vhs reads {FORMAT}: finish it with vhs {plan['vhs']}")
    return plan


def invalidated(keys: list[str]) -> list[str]:
    """Names of the stages whose units change when the science `keys` (dotted) do, in order."""
    from jobs.stages import STAGES

    names = []
    for stage in STAGES:
        reads = any(f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.") for a in keys for b in stage.SCIENCE)
        if reads or set(names) & set(stage.AFTER):
            names.append(stage.NAME)
    return names


def _refusal(out: str, keys: list[str]) -> str:
    from jobs.stages import BY_NAME

    there = open_storage(out).list()
    stages = [name for name in invalidated(keys) if any(made.startswith(BY_NAME[name].FOLDER) for made in there)]
    return (
        f"{out} was planned with other science: {', '.join(keys)} differ{'s' if len(keys) == 1 else ''}. That would invalidate "
        f"{', '.join(stages) or 'nothing but the plan'}. Run it beside, keeping what is still valid: --out NEW --reuse {out}"
    )


def adopt(run: Run, units: list[Unit], other: str) -> int:
    """Copy from the run at `other` the products of those `units` it has finished, markers last. Same identity, same work. -> how many."""
    source = open_storage(other)
    finished = [unit for unit in units if source.exists(unit.marker)]
    for unit in finished:
        marker = read_marker(source, unit.marker)
        names = [f"{marker.folder}/{name}" for name in marker.files] + (
            [f"{unit.path.rsplit('/', 1)[0]}/{marker.shard}"] if marker.shard else []
        )
        for name in [*names, unit.marker]:
            run.storage.commit(name, source.local(name))
    return len(finished)


def adopt_all(run: Run, other: str):
    """Copy what the run at `other` has finished of this one's work, stage after stage, as far as that goes."""
    from jobs.drive import frontier

    while (work := frontier(run)) and adopt(run, work[1], other):
        run.refresh()

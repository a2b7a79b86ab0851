"""`vhs study`: a family of runs of one configuration, made one after the other, and what they say together.

A study is a file of values (configs/studies). What it varies, which differences it reports and how often it may be looked at is frozen before the first run
(jobs/evidence.py). Each scope of each run that is finished becomes a small record; the run's files then go. A start makes what has no record, so the same
command resumes, and where the records came with the program it makes nothing and only tables them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import product
from pathlib import Path

from jobs import config as configuration
from jobs import evidence, plan, preflight
from jobs.config import PHANTOMS, SEALED, Config, ConfigError, changed
from jobs.drive import Failed
from jobs.evidence import Evidence
from jobs.plan import PlanError, Run
from shards.storage import Storage, open_storage
from vhs.study import Study, arms_of, as_word

MINE = "state/study.json"  # in a run: which study made it, and so may delete it
DESCRIPTIVE = "this only describes these data: so says the configuration (purpose: descriptive), with the reason"
MARKER = re.compile(r"-[0-9a-f]{12}\.(json|parquet)$")
OF_A_RUN = re.compile(  # what `vhs run` writes into its folder
    r"(plan\.json|splits-[^/]*|(real|labeller|priors|prompts|generator|generated|labels|rounds|classifier|checkpoints|predictions|report|state)/.*)"
)


@dataclass(frozen=True)
class Member:
    """One run of a study: its `name`, what it has of the varied keys, its configuration."""

    name: str
    vary: dict
    config: Config

    @cached_property
    def records(self) -> dict[str, str]:
        """scope -> the name of its record."""
        from vhs.split import scopes

        return {scope: f"{self.name}-{scope}" for scope in scopes(self.config.split)}


def read(name: str) -> tuple[Study, bool]:
    """The study that `name` means, a YAML file or one that comes with vhs -> (it, whether it came with vhs)."""
    file = configuration.find(name, "studies")
    return configuration.read(str(file), [], Study), file.resolve().parent == configuration.CONFIGS / "studies"


def members(study: Study, overrides: list[str] = ()) -> list[Member]:
    """Every run of the study, in order. ConfigError for a configuration that cannot be, for `overrides` that would change its science, and where sealed
    phantoms and those that settings are chosen on are in one study."""
    made, short = [], {key.rpartition(".")[2]: key for key in study.vary}
    names = {key: word for word, key in short.items()} if len(short) == len(study.vary) else {key: key for key in study.vary}
    for values in product(*study.vary.values()):
        vary = dict(zip(study.vary, values))
        written = [f"{key}={json.dumps(value)}" for key, value in {**study.set, **vary}.items()]
        if study.own_seeds:
            written += own_seeds(configuration.load(study.config, written))
        planned, config = configuration.load(study.config, written), configuration.load(study.config, [*written, *overrides])
        if keys := changed(planned.science, config.science):
            raise ConfigError(f"{', '.join(keys)}: a study's science is in its file. Behind the command stand only data= and execution.…=")
        if absent := sorted({arm for pair in study.pairs for arm in arms_of(pair)} - set(config.arms)):
            raise ConfigError(f"pairs: {', '.join(absent)} is no arm of the runs, which have {', '.join(config.arms)}: set arms, or leave the pair out")
        made.append(Member("_".join(f"{names[key]}-{as_word(value)}" for key, value in vary.items()) or "run", vary, config))
    sealed(made)
    return made


def own_seeds(config: Config) -> list[str]:
    """The seeds of a run that shares no draw with a run of other phantoms, as overrides."""
    first = config.phantoms.seed * 100  # more than one run has of classifiers
    sections = [name for name, section in config if name != PHANTOMS and "seed" in getattr(type(section), "model_fields", ())]
    return [f"seeds={[first + seed for seed in config.seeds]}", *(f"{name}.seed={first}" for name in sections)]


def sealed(made: list[Member]) -> bool | None:
    """Whether the phantoms are sealed ones; None where the images are real. ConfigError where some are and others are not."""
    seeds = sorted({one.config.phantoms.seed for one in made if one.config.data == PHANTOMS})
    if not seeds:
        return None
    if seeds[0] < SEALED <= seeds[-1]:
        raise ConfigError(f"phantoms.seed {seeds[0]} and {seeds[-1]} in one study: from {SEALED} on they are sealed, for reported figures. Take all there")
    return seeds[0] >= SEALED


def chosen(made: list[Member], only: list[str]) -> set[str]:
    """The records that are named by a pattern of `only`; all of them where there is none. ConfigError for a pattern that names none."""
    names = [record for one in made for record in one.records.values()]
    if idle := [pattern for pattern in only if not any(fnmatch(name, pattern) for name in names)]:
        known = ", ".join(names[:3]) + ", …" * (len(names) > 3)
        raise ConfigError(f"--only {idle[0]}: no record is called so. They are {known}, and * stands for anything")
    return {name for name in names if not only or any(fnmatch(name, pattern) for pattern in only)}


def protocol(study: Study, made: list[Member]) -> dict:
    """What is frozen before the first run."""
    return study.model_dump(mode="json") | {"runs": [one.name for one in made], "scopes": list(made[0].records)}


@dataclass(frozen=True)
class Making:
    """How the runs are made: below `out`, by `work` (a run and what to take over from, or None), one line a scope to `say`."""

    study: Study
    members: list[Member]
    out: str
    kept: Evidence
    work: Callable[[Run, str | None], None]
    say: Callable[[str], None]
    keep_runs: bool = False

    def missing(self, only: list[str] = ()) -> list[tuple[Member, list[str]]]:
        """The runs that lack records, each with the scopes that do; of these the ones whose record is named by a pattern of `only`, if there are any."""
        wanted = chosen(self.members, only)
        lacking = [
            (one, [scope for scope, name in one.records.items() if name in wanted and not self.kept.has(name, one.config)]) for one in self.members
        ]
        return [(one, scopes) for one, scopes in lacking if scopes]

    def refuse(self, place: preflight.Place, only: list[str] = ()):
        """ConfigError where the first run that is to be made could not come to its end."""
        wanted, there = chosen(self.members, only), set(self.kept.names())
        for one in self.members:
            if wanted & set(one.records.values()) - there:
                return preflight.refuse(Run(self.url(one), one.config, read_only=True), place)

    def make(self, only: list[str] = ()):
        """Make what is missing. A run that fails does not stop the others; PlanError says at the end which did."""
        todo, failed = self.missing(only), []
        before = {one.name: earlier for earlier, one in zip([None, *self.members], self.members)}  # what it may take over from
        self.tidy(keep={earlier.name for one, _ in todo[:1] if (earlier := before[one.name])})
        for number, (one, scopes) in enumerate(todo, 1):
            try:
                for scope in scopes:
                    self.say(f"{one.name}, {scope}: run {number} of {len(todo)} that are to do{self._left(todo[number - 1 :])}")
                    self._scope(one, scope, before[one.name])
            except Failed as error:
                self.say(str(error))
                failed.append(one.name)
            self.tidy(keep={one.name})
        self.tidy(keep=set())
        if failed:
            raise PlanError(f"{len(failed)} runs of study {self.study.name} failed, others did not: {', '.join(failed)}. The same command tries them again")

    def _scope(self, one: Member, scope: str, before: Member | None):
        url = self.url(one)
        storage = open_storage(url)
        if storage.exists("plan.json") and not self.made(storage, one):
            raise PlanError(f"{url} holds a run that study {self.study.name} did not make: give another --out, or move it away")
        storage.put(MINE, json.dumps({"study": self.study.name, "run": one.name}).encode())
        run = plan.start(one.config, url)
        run.only_scope = scope
        self.work(run, self.url(before) if before else None)
        run.refresh()
        self.kept.write(evidence.record_of(run, scope, self.study.name, one.name, one.vary))

    def url(self, one: Member) -> str:
        return f"{self.out}/runs/{one.name}"

    def made(self, storage: Storage, one: Member) -> bool:
        """Whether this study made the run there."""
        return storage.exists(MINE) and json.loads(storage.read(MINE)) == {"study": self.study.name, "run": one.name}

    def tidy(self, keep: set[str]):
        """Delete the files of the runs whose every record is kept, but of those in `keep`: what this study made, as `vhs run` wrote it. A run whose labels a
        person looked at stays: nobody could make it again."""
        if self.keep_runs:
            return
        for one in (one for one in self.members if one.name not in keep):
            storage = open_storage(self.url(one))
            if self.made(storage, one) and all(self.kept.has(name, one.config) for name in one.records.values()):
                names = [name for name in storage.list() if OF_A_RUN.fullmatch(name)]
                if any(name.startswith((plan.CORRECTIONS, plan.CONFIRMED)) for name in names):
                    continue
                # markers first, which make the rest visible; last the word whose the run is
                for name in sorted(names, key=lambda name: (name == MINE, not MARKER.search(name), name)):
                    storage.delete(name)
                _remove_empty(self.url(one))

    def _left(self, todo: list[tuple[Member, list[str]]]) -> str:
        """How long the rest takes by what the recorded scopes took, one after the other."""
        mine, there = {name for one in self.members for name in one.records.values()}, self.kept.names()
        spent = [self.kept.about(name)["seconds"] for name in there if name in mine]
        if not spent:
            return ""
        hours = sum(spent) / len(spent) * sum(len(scopes) for _, scopes in todo) / max(1, self.members[0].config.execution.workers) / 3600
        return f", about {hours:.1f} h left" if hours >= 1 else f", about {60 * hours:.0f} min left"


def _remove_empty(url: str):
    """Folders that deleting left empty; an object store has none."""
    folder = Path(url)
    for inside in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True) if folder.is_dir() else ():
        if not any(inside.iterdir()):
            inside.rmdir()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def table(making: Making, early: bool) -> dict:
    """The study's answer from its records, as study.json has it, and its page below `out`. `early`: of those that are there so far. PlanError where some
    are missing, or none is there."""
    from vhs.metrics.study import QUESTIONS
    from vhs.report.study import render, shown

    study, names = making.study, [(name, one.config) for one in making.members for name in one.records.values()]
    there = [name for name, config in names if making.kept.has(name, config)]
    if foreign := [name for name in there if making.kept.about(name)["study"] != study.name]:
        raise PlanError(
            f"{making.kept.folder}/{foreign[0]}.csv is a record of study {making.kept.about(foreign[0])['study']}, which counts how often it is looked at: "
            f"give {study.name} records of its own by --records ANOTHER"
        )
    if not there or (len(there) < len(names) and not early):
        raise PlanError(
            f"study {study.name} has {len(there)} of {len(names)} records: it is tabled when all are there. The same command makes the others"
            + ("; --early tables these, and counts as a look" if there else "")
        )
    records = [making.kept.read(name) for name in there]
    findings = QUESTIONS[study.question](records, study.pairs, study.along)
    about = [record.about for record in records]
    found = {
        "study": protocol(study, making.members), "sealed": sealed(making.members), "records": len(there), "of": len(names),
        "looks": making.kept.look(there, shown(findings)), "core_seconds": sum(one["core_seconds"] for one in about),
        "patients_known": all(one["patients_known"] for one in about),
        "made_by": sorted({f"vhs {one['vhs']}" + (f" at {one['commit']}" if one["commit"] else "") for one in about}),
        "machines": sorted({", ".join(str(word) for word in one["machine"].values() if word) for one in about}),
        "sentences": findings.sentences + [DESCRIPTIVE] * any(one.config.purpose == "descriptive" for one in making.members), "tables": findings.tables,
    }  # fmt: skip
    page, figures = render(found, findings)
    storage = open_storage(making.out)
    storage.put("study.json", json.dumps(found, indent=1).encode() + b"\n")
    storage.put("index.html", page.encode())
    for name, svg in figures.items():
        storage.put(f"{name}.svg", svg)
    return found

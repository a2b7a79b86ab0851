"""One trial of `vhs tune`: an arm trained as stage train does it, with other settings, judged on the inner validation and on nothing else."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, replace
from functools import cached_property

from jobs import world
from jobs.attempt import Inputs, Output
from jobs.config import Config
from jobs.lineage import LeakError
from jobs.stages import train
from jobs.unit import Unit
from shards.storage import Storage, open_storage
from vhs.tuning import Settings

SCOPE = "split"
MADE = ("generated", "labels", "generator")
ROLES = ("real", *MADE, *(f"mixed_{role}" for role in MADE), "corrections", "labeller")


@dataclass(frozen=True)
class Trial:
    """`settings` tried on an arm. `config` is the run's with them, `unit` the run's training of that arm with them: its identity tells the trial.

    Plain values only: it travels to other machines.
    """

    number: int
    arm: str
    settings: Settings
    config: dict
    unit: Unit

    @property
    def name(self) -> str:
        return f"{self.arm} {self.number}"


def make(config: Config, arm: str, unit: Unit, number: int, settings: Settings) -> Trial:
    """Trial `number` of the arm that `unit` trains in a run with `config`. One process trains it, on however many ranks the run does."""
    if arm == "real":
        settings = replace(settings, generated_share=None)
    said = settings.overrides(config.generation.quota)
    values = config.model_dump(mode="json")
    for key, value in {**said, "classifier.ranks": 1, "classifier.sharding": None}.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    science = unit.science | {"classifier": values["classifier"], "generation.quota": values["generation"]["quota"]}
    params = dict(unit.params)
    if "dose" in params:  # a generator's outside of the run: the same share of it
        params["dose"] = max(1, round(params["dose"] * values["generation"]["quota"] / config.generation.quota))
    return Trial(number, arm, settings, values, replace(unit, path=f"tune/{arm}/{number:03d}", science=science, params=params, ranks=1, apart=False))


class Inside(Inputs):
    """A run as a trial sees it: of the real images those that scope `split` trains on and validates itself with, and what was generated for it.

    It holds no other row, so nothing that is given it can look at a test image or at a fold whose figures are reported: who asks is told so by a
    LeakError. The names of the patients and images held out stay: by them the guard refuses a generated image that has seen one.
    """

    def __init__(self, storage: Storage, unit: Unit):
        from vhs import split

        super().__init__(storage, unit)
        splits = super().table("splits")
        if self.params["scope"] != SCOPE or (splits.fold >= 0).any():
            raise LeakError(f"a search opens no reported fold: this run's scope is {self.params['scope']}, its images lie in {splits.fold.max() + 1} folds")
        parts = {"training": split.training(splits, SCOPE), "inner": split.inner(splits, SCOPE)}
        self._mine = splits[splits.key.isin([key for keys in parts.values() for key in keys])][["key", "patient"]]
        self._parts = {name: frozenset(keys) for name, keys in parts.items()}
        others = splits[~splits.key.isin(self._mine.key)]
        self.held_out_patients, self.held_out_keys = frozenset(others.patient), frozenset(others.key)

    @cached_property
    def training(self):
        return self._part("training")

    @cached_property
    def inner(self):
        return self._part("inner")

    @property
    def held_out(self):
        raise self._closed("the held-out images")

    def samples(self, role: str):
        rows = super().samples(self._known(role))
        return rows[rows.key.isin(self._mine.key)].reset_index(drop=True) if role == "real" else rows

    def table(self, role: str):
        return super().table(self._known(role))

    def markers(self, role: str):
        return super().markers(self._known(role))

    def _part(self, name: str):
        """Rows as lineage.split_rows gives them."""
        rows = self.samples("real").drop(columns="patient").merge(self._mine, on="key", validate="one_to_one")
        return rows[rows.key.isin(self._parts[name])].sort_values("key").reset_index(drop=True)

    def _known(self, role: str) -> str:
        if role not in ROLES:
            raise self._closed(role)
        return role

    def _closed(self, what: str) -> LeakError:
        return LeakError(f"a trial of vhs tune asked for {what}: the test split is closed to it. It has {', '.join(ROLES)}, of real images training and inner")


def perform(url: str, record: str, trial: Trial, report) -> None:
    """Train the trial on this machine; `report` hears of every epoch and may raise to end it. What is at `record` already is only told again.

    A loss that is no number is an answer: {"diverged": why}. Any other error is raised.
    """
    storage = open_storage(url)
    if storage.exists(record):
        for row in json.loads(storage.read(record))["epochs"]:
            report(row)
        return
    from vhs.checkpoint import Silent

    config, begun, rows = Config.model_validate(trial.config), time.monotonic(), []
    world.set_environment(config.threads)
    world.set_numerics(config.threads)

    def about() -> dict:
        return {"node": socket.gethostname(), "seconds": round(time.monotonic() - begun, 1)}

    def told(figures: dict):
        rows.append({name: value for name, value in figures.items() if name.startswith("validation_")})
        share = len(rows) / trial.settings.epochs + 1e-9  # ASHA multiplies its marks, and 0.2 * 3 is more than 0.6
        report({"epoch": len(rows), "share": share, **rows[-1], "real": figures["real"], "generated": figures["generated"], **about()})

    try:
        inputs = Inside(storage, trial.unit)
        train.fit(config, inputs, inputs, Output(None, Silent(), None), told)
    except FloatingPointError as error:
        report({"diverged": str(error), **about()})


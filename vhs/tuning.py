"""The space of a hyper-parameter search, and the trials drawn from it: a function of the seed alone, so that every arm is given the same ones.

The space itself is configs/search.yaml, or a file like it; what is legal in it is what vhs/settings.py allows a classifier. No torch, no Ray.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from vhs.settings import Classifier, Section

WORDS = {"learning_rate": "rate", "batch": "batch", "drop_rate": "dropout", "head_hidden": "head", "generated_share": "generated"}
METRICS = {"validation_accuracy": "max", "validation_loss": "min"}


class Range(Section):
    """From `low` to `high`, both included."""

    low: float
    high: float

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if not self.low <= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}: write the lower one first")
        return self


class Search(Section):
    """What is searched: a Range, or the values to choose from. And how: what ASHA goes by (Li et al. 2020)."""

    learning_rate: Range
    batch: tuple[int, ...] = Field(min_length=1)
    epochs: tuple[int, ...] = Field(min_length=1)
    drop_rate: Range
    head_hidden: tuple[int, ...] = Field(min_length=1)
    generated_share: Range
    metric: Literal["validation_accuracy", "validation_loss"]
    grace: float = Field(gt=0, le=1)
    reduction: float = Field(gt=1)

    @model_validator(mode="after")
    def _every_trial_is_legal(self) -> Search:
        for name in ("learning_rate", "batch", "epochs", "drop_rate", "head_hidden"):
            space = getattr(self, name)
            for value in (space.low, space.high) if isinstance(space, Range) else space:
                try:
                    Classifier(**{name: value})
                except ValidationError as error:
                    raise ValueError(f"{name} {value:g} is not legal for a classifier: {error.errors()[0]['msg'].removeprefix('Input ')}") from None
        if not 0 < self.generated_share.low <= self.generated_share.high <= 1:
            raise ValueError(f"generated_share lies within (0, 1], got {self.generated_share.low:g} to {self.generated_share.high:g}")
        if self.grace * min(self.epochs) < 1:  # else a trial's first word comes after ASHA's first look
            least = math.ceil(100 / min(self.epochs)) / 100
            raise ValueError(f"grace {self.grace:g} of {min(self.epochs)} epochs is less than one: raise it to {least} or more")
        return self


@dataclass(frozen=True)
class Settings:
    """What one trial tries; `generated_share` None where an arm has no generated images."""

    learning_rate: float
    batch: int
    epochs: int
    drop_rate: float
    head_hidden: int
    generated_share: float | None

    def overrides(self, quota: int) -> dict[str, object]:
        """The same as settings of a run whose `generation.quota` is `quota`: dotted key -> value."""
        share = {"generation.quota": max(1, round(self.generated_share * quota))} if self.generated_share else {}
        return {f"classifier.{name}": value for name, value in asdict(self).items() if name != "generated_share"} | share


def draw(search: Search, count: int, seed: int) -> list[Settings]:
    """The first `count` trials of a search with this seed. More of them begin with the same ones.

    A scrambled Halton sequence: a dozen of its points cover six axes more evenly than a dozen independent ones.
    """
    from scipy.stats import qmc

    names = list(Settings.__dataclass_fields__)
    points = qmc.Halton(len(names), rng=seed).random(count)
    return [Settings(**{name: _at(getattr(search, name), share, name == "learning_rate") for name, share in zip(names, point)}) for point in points]


def _at(space: Range | tuple[int, ...], share: float, logarithmic: bool) -> float | int:
    """The value at `share` (0 to 1) of a range, to three figures so that it can be typed, or of a list."""
    if not isinstance(space, Range):
        return space[min(int(share * len(space)), len(space) - 1)]
    ends = (math.log(space.low), math.log(space.high)) if logarithmic else (space.low, space.high)
    value = ends[0] + float(share) * (ends[1] - ends[0])
    return min(max(float(f"{math.exp(value) if logarithmic else value:.3g}"), space.low), space.high)


def rows(table: dict) -> list[dict]:
    """The trials of a search's table (jobs/search.py) as people read them: arms in order, in each the best trial first, stopped ones last."""
    metric, arms = table["space"]["metric"], list(dict.fromkeys(trial["arm"] for trial in table["trials"]))

    def place(trial: dict) -> tuple:
        return arms.index(trial["arm"]), trial["state"] != "whole", *(-figure for figure in standing(trial, metric)), trial["number"]

    return [
        {
            "arm": trial["arm"],
            "epochs": f"{sum('epoch' in row for row in trial['epochs'])} of {trial['settings']['epochs']}" + ", diverged" * (trial["state"] == "diverged"),
            "trial": trial["number"],
            **{word: _figure(trial["settings"][name]) for name, word in WORDS.items()},
            **{name.removeprefix("validation_"): _figure(trial["score"][name]) for name in METRICS},
        }
        for trial in sorted(table["trials"], key=place)
    ]  # fmt: skip


def _figure(value: float | None) -> float:
    return math.nan if value is None else value


def standing(trial: dict, metric: str) -> list[float]:
    """What a finished trial is ranked by, more is better: its score in `metric`, then in the other one."""
    order = sorted(METRICS, key=lambda name: name != metric)
    found = [(trial["score"][name], METRICS[name]) for name in order]
    return [-math.inf if value is None else value if mode == "max" else -value for value, mode in found]

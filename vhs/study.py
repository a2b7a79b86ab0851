"""A study's file: which runs of one configuration are made, and what will be said of them. Plain pydantic; jobs/study.py makes them,
vhs/metrics/study.py has what they say."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vhs.settings import Section

PHANTOM_SEED = "phantoms.seed"
ALONG = ("dose", "worth")  # questions that go along one of the varied keys
WORD = re.compile(r"[A-Za-z0-9.+_-]+")


def _flat(values: object, prefix: str = "") -> dict:
    """{"a": {"b": 1}} and {"a.b": 1} are the same keys."""
    if not isinstance(values, dict):
        raise ValueError("write keys with their values, dotted: phantoms.seed: [1000, 1001]")
    found = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


class Study(Section):
    """A study's file."""

    name: str = Field(pattern=r"^[\w-]+$")
    question: Literal["calibration", "dose", "worth", "pooled"]  # vhs/metrics/study.py has a function for each
    config: str  # of every run
    set: Annotated[dict, BeforeValidator(_flat)] = {}  # its settings that are the same for all, dotted keys
    vary: Annotated[dict, BeforeValidator(_flat)] = {}  # and those that are not: one run for each combination, the last key fastest
    own_seeds: bool = False  # every other seed of a run follows from its phantoms.seed, so that sets of phantoms share no draw
    along: str | None = None  # the varied key that dose and worth go along
    pairs: tuple[str, ...] = Field(("mixed - real-matched",), min_length=1)  # the differences that will be reported, the first one before all
    looks: int = Field(1, ge=1)  # times that it will be tabled

    @field_validator("vary")
    @classmethod
    def _names_runs(cls, vary: dict) -> dict:
        for key, values in vary.items():
            if not isinstance(values, list) or not values or len(set(map(str, values))) != len(values):
                raise ValueError(f"{key}: a list of distinct values, got {values!r}")
            if odd := [value for value in values if not WORD.fullmatch(as_word(value))]:
                raise ValueError(f"{key}: {odd[0]!r} cannot be part of a run's name: numbers, plain words and lists of these can")
        return vary

    @model_validator(mode="after")
    def _can_be_asked(self) -> Study:
        for pair in self.pairs:
            arms_of(pair)
        if both := sorted(set(self.set) & set(self.vary)):
            raise ValueError(f"{', '.join(both)} is set and varied: leave one of the two out")
        if (self.along in self.vary) != (self.question in ALONG) or (self.along and self.question not in ALONG):
            raise ValueError(f"along = {self.along!r}: {self.question} wants {'a key of vary' if self.question in ALONG else 'none'}")
        if self.own_seeds and PHANTOM_SEED not in self.vary:
            raise ValueError(f"own_seeds follow from {PHANTOM_SEED}: vary it, or leave own_seeds out")
        if self.question == "calibration" and not self.vary:
            raise ValueError("vary: how often an interval covers 0 takes several runs")
        return self


def as_word(value: object) -> str:
    """A varied value in a run's name: [jsrt, wingspan] is jsrt+wingspan."""
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def arms_of(pair: str) -> tuple[str, str]:
    """"mixed - real-matched" -> its two arms. ValueError for anything else."""
    first, minus, second = pair.partition(" - ")
    if not (minus and first and second) or first == second or " " in first + second:
        raise ValueError(f"{pair!r} is no difference of two arms: write for example mixed - real-matched")
    return first, second

"""The quota, in rounds: which units of generation a scope needs, as a pure function of what was labelled before.

A round's list is frozen in rounds/<scope>/<number>.json by the first who computes it. The quota counts measured classes, so a round asks for more of
every class still short of it, under that class's prompt (with `generation.by_source`, of every class and source); the plan bounds the rounds, and a
quota not met by then is reported, not hidden. A generator outside of the run, which can be asked for no class, gives as many units of its set's next images
as a round of all classes has, until none is left.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial

import pandas as pd

from jobs import labels as corrections
from jobs import outside
from jobs.drawing import stratum
from jobs.generators import DREAMBOOTH, KNOWING, committed, made_by, outsiders, place, quota, wanted
from jobs.outside import ANY
from jobs.unit import Unit
from shards import manifest
from vhs.measure import CLASSES


def strata(run, scope: str, generator: str = DREAMBOOTH) -> dict[str, tuple[str, str | None]]:
    """What the quota counts, by folder: each class, or each class and source of the scope's training images, as (class, source)."""
    sources = [None]
    if run.config.generation.by_source and generator not in outsiders(run.config):
        sources = run.marker(*committed(run, "dreambooth", generator, scope)).facts["sources"]
    return {stratum(name, source): (name, source) for name in CLASSES for source in sources}


def quota_of_a_class(run, scope: str, generator: str = DREAMBOOTH) -> int:
    """Accepted images wanted of a class, all its sources together."""
    return quota(run.config, generator) * len(strata(run, scope, generator)) // len(CLASSES)


def units(run, scope: str, generator: str = DREAMBOOTH) -> list[Unit]:
    """The units of every round of a generator for `scope` that can be listed now, in order. What was listed stays, whatever a person said since; a list
    that was lost between others is made again."""
    settings, counted, contents, rounds = run.config.generation, strata(run, scope, generator), [], []
    folder = f"rounds/{place(generator, scope)}"
    frozen = set(run.under(f"{folder}/"))
    while len(rounds) < settings.max_rounds:
        path = f"{folder}/{len(rounds):03d}.json"
        if path in frozen:
            contents.append(json.loads(run.storage.read(path)))
        elif (content := _next(run, generator, scope, counted, contents, rounds)) is None:
            break
        else:
            contents.append(run.freeze(path, content, window="round-before-commit"))
        rounds.append(_named(run, generator, scope, counted, contents[-1]))
    return [unit for of_round in rounds for unit in of_round]


def _next(run, generator: str, scope: str, counted: dict, contents: list[dict], rounds: list[list[Unit]]) -> Callable[[], dict] | None:
    """What lists the round after `rounds`; None while the last one is at work, or once no further round is called for."""
    from jobs.stages import label

    listed = [unit for of_round in rounds for unit in of_round]
    labels = [label.unit(run, unit) for unit in listed if run.done(unit)]
    if len(labels) < len(listed) or not all(map(run.done, labels)):
        return None
    accepted, last = _accepted(run, scope, generator, counted, contents, labels), labels[-len(rounds[-1]) :] if rounds else []
    short = [name for name in counted if accepted[name] < quota(run.config, generator)]
    if not short or _waiting(run, last):
        return None
    drawn, count = Counter(name for content in contents for name, numbers in content["units"].items() for _ in numbers), run.config.generation.round_units
    if generator in outsiders(run.config):
        short, count = [ANY], min(count * len(CLASSES), outside.units(run, generator, scope) - drawn[ANY])
    return partial(_listing, short, drawn, accepted, count) if count else None


def _named(run, generator: str, scope: str, counted: dict[str, tuple[str, str | None]], content: dict) -> list[Unit]:
    """The units of the round that lists `content`."""
    from jobs.stages import generate

    asked = {**counted, ANY: (None, None)}
    return [generate.unit(run, generator, scope, *asked[name], n) for name in asked for n in content["units"].get(name, ())]


def _accepted(run, scope: str, generator: str, counted, contents: list[dict], labels: list[Unit]) -> dict[str, int]:
    """Accepted images of each stratum in all `labels`. The last round's list says what there was before it, unless a person spoke since."""
    accepted, units = dict.fromkeys(counted, 0), labels
    if contents and not corrections.tables(run, scope, generator):
        last = sum(map(len, contents[-1]["units"].values()))
        accepted, units = {name: contents[-1]["accepted_before"].get(name, 0) for name in counted}, labels[len(labels) - last :]
    for done in units:
        for name, count in corrections.accepted(run, done).items():
            accepted[stratum(name, done.params.get("source"))] += count
    return accepted


def _waiting(run, labels: list[Unit]) -> bool:
    """With label_by hand: whether no person has yet judged anything of the round labelled in `labels`. Where classes are known nobody is asked."""
    asked = [unit for unit in labels if made_by(unit.params) not in KNOWING]
    return run.config.label_by == "hand" and bool(asked) and not corrections.judged(run, asked)


def waiting(run) -> list[str]:
    """Scopes whose last round a person has to judge before the run goes on."""
    from jobs.stages import label

    def waits(scope: str, generator: str) -> bool:
        listed = [json.loads(run.storage.read(name)) for name in run.under(f"rounds/{place(generator, scope)}/")]
        last = {(name, n) for name, numbers in listed[-1]["units"].items() for n in numbers} if listed else set()
        drawn = [unit for unit in run.units("generate") if unit.params["scope"] == scope and made_by(unit.params) == generator]
        of_last = [u for u in drawn if (stratum(u.params["class"], u.params.get("source")) if "class" in u.params else ANY, u.params["number"]) in last]
        return _waiting(run, [label.unit(run, unit) for unit in of_last if run.done(unit)])

    return [scope for scope in run.scopes if any(waits(scope, name) for name in wanted(run.config))] if run.config.label_by == "hand" else []


def _listing(short: list[str], drawn: dict[str, int], accepted: dict[str, int], count: int) -> dict:
    """A round's list: the next `count` units of every stratum in `short`, after those `drawn`."""
    return {"units": {name: [drawn[name] + i for i in range(count)] for name in short}, "accepted_before": accepted}


def accepted(generated: pd.DataFrame, labels: pd.DataFrame, quota: int) -> pd.DataFrame:
    """The generated images to train on: of every measured class (and prompted source) the first `quota` accepted, by number, not by arrival."""
    rows = generated.merge(labels, on="key", validate="one_to_one")
    order = rows.prompted.map({name: number for number, name in enumerate(CLASSES)})
    rows = rows.assign(order=order)[rows.accepted].sort_values(["number", "order"], kind="stable")
    return rows.groupby(["label", "source"], sort=True, dropna=False).head(quota).drop(columns="order").reset_index(drop=True)


def recounted(run, scope: str) -> bool:
    """Whether mixed trains on another number of images of some class because of what a person said of them. All other arms but real draw by those numbers."""
    if not (said := corrections.tables(run, scope)):
        return False
    made = (tuple(committed(run, stage, DREAMBOOTH, scope)) for stage in ("generate", "label"))
    return _recounted(run.storage, *made, tuple(said), run.config.generation.quota)


@lru_cache(maxsize=64)  # every arm and seed of a scope asks, whenever the units are named anew; what the names stand for does not change
def _recounted(storage, generated: tuple[str, ...], labelled: tuple[str, ...], said: tuple[str, ...], quota: int) -> bool:
    images, labels = manifest.load(storage, paths=generated).to_pandas(), corrections.read(storage, labelled)
    now = corrections.corrected(labels, corrections.read(storage, said))
    before, after = (accepted(images, rows, quota).label.value_counts().to_dict() for rows in (labels, now))
    return before != after

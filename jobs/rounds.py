"""The quota, in rounds: which units of generation a scope needs, as a pure function of what was labelled before.

A round's list is frozen in rounds/<scope>/<number>.json by the first who computes it. The quota counts measured classes, so a round asks for more of
every class still short of it, under that class's prompt (with `generation.by_source`, of every class and source); the plan bounds the rounds, and a
quota not met by then is reported, not hidden.
"""

from __future__ import annotations

import json
from functools import partial

import pandas as pd

from jobs import labels as corrections
from jobs.drawing import stratum
from jobs.unit import Unit
from vhs.measure import CLASSES


def strata(run, scope: str) -> dict[str, tuple[str, str | None]]:
    """What the quota counts, by folder: each class, or each class and source of the scope's training images, as (class, source)."""
    sources = [None]
    if run.config.generation.by_source:
        sources = run.marker(*run.committed("dreambooth", scope=scope)).facts["sources"]
    return {stratum(name, source): (name, source) for name in CLASSES for source in sources}


def quota_of_a_class(run, scope: str) -> int:
    """Accepted images wanted of a class, all its sources together."""
    return run.config.generation.quota * len(strata(run, scope)) // len(CLASSES)


def units(run, scope: str) -> list[Unit]:
    """The units of every round of `scope` that can be listed now, in order."""
    from jobs.stages import generate, label

    settings, listed, counted = run.config.generation, [], strata(run, scope)
    accepted, drawn, labels = dict.fromkeys(counted, 0), dict.fromkeys(counted, 0), []
    for number in range(settings.max_rounds):
        short = [name for name in counted if accepted[name] < settings.quota]
        path = f"rounds/{scope}/{number:03d}.json"
        if path not in run.names and (not short or _waiting(run, labels)):  # what was listed stays, whatever a person said since
            break
        content = run.freeze(path, partial(_listing, short, drawn, accepted, settings.round_units), window="round-before-commit")
        new = [generate.unit(run, scope, *counted[name], n) for name in counted for n in content["units"].get(name, ())]
        listed += new
        labels = [label.unit(run, unit) for unit in new if run.done(unit)]
        if len(labels) < len(new) or not all(map(run.done, labels)):
            break  # this round is still at work
        for done in labels:
            source = done.params.get("source")
            drawn[stratum(done.params["class"], source)] += 1
            for name, count in corrections.accepted(run, done).items():
                accepted[stratum(name, source)] += count
    return listed


def _waiting(run, labels: list[Unit]) -> bool:
    """With label_by hand: whether no person has yet judged anything of the round labelled in `labels`."""
    return run.config.label_by == "hand" and bool(labels) and not corrections.judged(run, labels)


def waiting(run) -> list[str]:
    """Scopes whose last round a person has to judge before the run goes on."""
    from jobs.stages import label

    found = []
    for scope in run.scopes if run.config.label_by == "hand" else []:
        listed = [json.loads(run.storage.read(name)) for name in sorted(run.names) if name.startswith(f"rounds/{scope}/")]
        last = {(name, n) for name, numbers in listed[-1]["units"].items() for n in numbers} if listed else set()
        drawn = [unit for unit in run.units("generate") if unit.params["scope"] == scope]
        of_last = [u for u in drawn if (stratum(u.params["class"], u.params.get("source")), u.params["number"]) in last]
        if _waiting(run, [label.unit(run, unit) for unit in of_last if run.done(unit)]):
            found.append(scope)
    return found


def _listing(short: list[str], drawn: dict[str, int], accepted: dict[str, int], count: int) -> dict:
    """A round's list: the next `count` units of every stratum in `short`, after those `drawn`."""
    return {"units": {name: [drawn[name] + i for i in range(count)] for name in short}, "accepted_before": accepted}


def accepted(generated: pd.DataFrame, labels: pd.DataFrame, quota: int) -> pd.DataFrame:
    """The generated images to train on: of every measured class (and prompted source) the first `quota` accepted, by number, not by arrival."""
    rows = generated.merge(labels, on="key", validate="one_to_one")
    rows = rows[rows.accepted].assign(order=lambda table: table.prompted.map(CLASSES.index)).sort_values(["number", "order"], kind="stable")
    return rows.groupby(["label", "source"], sort=True, dropna=False).head(quota).drop(columns="order").reset_index(drop=True)

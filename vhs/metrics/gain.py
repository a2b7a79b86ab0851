"""What a person's corrections of generated images changed: an arm before any, and after each import that it was trained on."""

from __future__ import annotations

import pandas as pd

from vhs.metrics.intervals import accuracy, paired_difference
from vhs.metrics.predictions import by_arm, of_test_part, out_of_fold


def gain_by_corrections(answers: pd.DataFrame) -> pd.DataFrame:
    """Predictions (vhs/metrics/predictions.py) of several trainings of each arm, with `after`, the number of the last import that the training knew (0: none),
    and `corrected`, how many of the arm's images of its scope had been corrected by then

    -> of each arm and part ("test", "out of fold") a row for each import, rising: arm, part, after, corrected, seeds, accuracy, low, high; gain, from, to over
    the row above, and over the first of them in all_gain, all_from, all_to, None in the first. In points, with 95% intervals, differences paired by image and
    seed. An arm of which nothing was corrected has no row.
    """
    rows = []
    for arm, own in by_arm(answers[answers.corrected.groupby(answers.arm).transform("max") > 0]):
        for part, of_part in (("test", of_test_part(own)), ("out of fold", out_of_fold(own))):
            if len(states := _states(of_part)) > 1:
                rows += [{"arm": arm, "part": part, **row} for row in _rows(states)]
    return pd.DataFrame(rows)


def _states(answers: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """{import: the part's answers as they stood after it}: of every scope those of its last training by then. An import that not every seed was trained on,
    for another came before the run was at its end, is no state."""
    seeds = answers.groupby(["scope", "after"]).seed.unique().map(frozenset)
    whole = [pair for pair in seeds.index if seeds[pair] == seeds[pair[0]].iloc[-1]]
    answers = answers[pd.MultiIndex.from_frame(answers[["scope", "after"]]).isin(whole)]
    found = {}
    for number in sorted(answers.after.unique()):
        then = answers[answers.after <= number]
        then = then[then.after == then.groupby("scope").after.transform("max")]
        if set(then.scope) == set(answers.scope):
            found[int(number)] = then
    return found


def _rows(states: dict[int, pd.DataFrame]) -> list[dict]:
    rows, (first, *_) = [], states.values()
    for (number, now), before in zip(states.items(), [None, *states.values()]):
        found, corrected = accuracy(now), now.groupby("scope").corrected.max().sum()
        row = {"after": number, "corrected": int(corrected), "seeds": now.seed.nunique()}
        row |= _points(("accuracy", "low", "high"), found["accuracy"], found["ci95"])
        row |= _gain(("gain", "from", "to"), now, before) | _gain(("all_gain", "all_from", "all_to"), now, None if before is None else first)
        rows.append(row)
    return rows


def _gain(names: tuple[str, str, str], now: pd.DataFrame, before: pd.DataFrame | None) -> dict:
    if before is None:
        return dict.fromkeys(names)
    found = paired_difference(pd.concat([now.assign(arm="now"), before.assign(arm="before")]), "now", "before")
    return _points(names, found["difference"], found["ci95"])


def _points(names: tuple[str, str, str], value: float, interval: list[float]) -> dict:
    return dict(zip(names, (100 * figure for figure in (value, *interval))))

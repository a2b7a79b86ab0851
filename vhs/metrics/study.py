"""What the runs of a study say together: records in, tables out.

Each question has one function, in QUESTIONS: (records, study's pairs, the key that it goes along) -> Findings. Accuracies and differences have the intervals of
intervals.py, which speak of new patients judged by new trainings on the same images. Where runs differ in their data or their training, the mean over runs has
Student's interval beside it, which speaks of new runs and knows nothing of patients.

An arm that is to train on generated images and got none in a run is the same training as real-matched: that run says nothing of it and is left out, by name,
and the sentence says how many are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from vhs.arms import REAL
from vhs.metrics.intervals import LEVEL, Trainings, accuracy, paired_difference, trainings
from vhs.metrics.predictions import NO_SEED, UNLABELLED, by_arm
from vhs.metrics.record import Record
from vhs.metrics.worth import SETS, Level, worth_of
from vhs.study import arms_of

PERCENT, POINTS, IMAGES = "percent", "points", "images"  # units of a figure
DOSE = "generated images, % of the real ones"
COVERS, ABOVE, BELOW = "cover 0", "above 0", "below 0"  # where an interval lies
# What calibration asks of an arm that cannot help and of one that must, fixed before any of its runs was looked at: where at least
# this share of the intervals of at least so many runs lies.
CRITERIA, SHARE, RUNS = {"null": COVERS, "oracle": ABOVE}, 0.85, 20


@dataclass(frozen=True)
class Findings:
    """`sentences`: the answer, in words. `tables`: caption -> rows; a cell is a word, a number, or a figure {"value", "ci95", "unit"}.
    `plots`: what vhs/report/study.py draws, by the names of its functions."""

    sentences: list[str]
    tables: dict[str, list[dict]]
    plots: dict[str, list[dict]] = field(default_factory=dict)


def calibration(records: Sequence[Record], pairs: Sequence[str], along: str | None = None) -> Findings:
    """How often the interval of a run covers 0: for a pair without a difference it should nearly always, for one with a large one never. Intervals as a
    study has them, in which runs say together how much trainings differ; and beside them as each run alone would say."""
    rows, left_out = differences(records, pairs)
    runs, sentences, shares = by_run(records), [], []
    for row in rows:
        row["by its own seeds alone"] = _paired(pool(runs[row["run"]]), row["pair"])["difference"]
    for pair in pairs:
        of_pair = [row for row in rows if row["pair"] == pair]
        counts = _places([row["difference"] for row in of_pair])
        share = {f"share {place}": _share(counts[place], len(of_pair)) for place in (COVERS, ABOVE)}
        alone = _places([row["by its own seeds alone"] for row in of_pair])
        shares.append({"pair": pair, "runs": len(of_pair), **counts, **share, "mean over runs": over_runs(of_pair)})
        sentences.append(
            f"{pair}: of {len(of_pair)} intervals {_listed(counts)}{_met(arms_of(pair)[0], counts, len(of_pair))}. By its own seeds alone, as one "
            f"run would say it: {_listed(alone)}"
        )
    tables = {"How many of the 95% intervals cover 0": shares, "Every run by itself": rows}
    return Findings(sentences + left_out, tables, {"by_run": rows})


def _places(figures: Sequence[dict]) -> dict[str, int]:
    """How many of the figures' intervals lie where."""
    low, high = (np.array([figure["ci95"][end] for figure in figures]) for end in (0, 1))
    return {COVERS: int(((low <= 0) & (high >= 0)).sum()), ABOVE: int((low > 0).sum()), BELOW: int((high < 0).sum())}


def _listed(counts: dict[str, int]) -> str:
    return f"{counts[COVERS]} cover 0, {counts[ABOVE]} lie above, {counts[BELOW]} below"


def _met(arm: str, counts: dict[str, int], runs: int) -> str:
    """Whether what is asked of a control was seen; nothing is asked of other arms."""
    if (place := CRITERIA.get(arm)) is None:
        return ""
    met = runs >= RUNS and counts[place] >= SHARE * runs
    return f"; asked for is that of {RUNS} or more at least {100 * SHARE:.0f}% {place.replace('above', 'lie above')}: {'met' if met else 'NOT MET'}"


def dose(records: Sequence[Record], pairs: Sequence[str], along: str | None = None) -> Findings:
    """Accuracy of each arm at each value of `along`, and the pairs' differences: what is added to real-matched, which trains as long as each dose on real
    images alone, and so is each dose's zero."""
    levels, rows, changes, said, left_out = by_level(records, along), [], [], {pair: [] for pair in pairs}, []
    doses = [{DOSE: 0, "pair": pair, "difference": {"value": 0.0, "ci95": [0.0, 0.0], "unit": POINTS}} for pair in pairs]
    for level, group in levels.items():
        predictions, share = pool(group), _share_generated(group, arms_of(pairs[0])[0])
        rows += [{along: level, DOSE: share, "arm": arm, **_accuracy(of_arm)} for arm, of_arm in by_arm(predictions)]
        of_runs, unmixed = differences(group, pairs)
        left_out += unmixed
        for pair in pairs:
            mixed, of_pair = _mixed_in(group, pair), [row for row in of_runs if row["pair"] == pair]
            found = {along: level, DOSE: share, "pair": pair, "generated images": _generated(mixed, pair), **_difference(mixed, pair)}
            figure, basis = _headline(found, of_pair, len(by_run(group)))
            changes.append(found | {"mean over runs": over_runs(of_pair)})
            doses.append({DOSE: share, "pair": pair, "difference": figure})
            said[pair].append(f"{words(figure)} at {level} ({basis})")
    sentences = [f"{pair}, points by {along}: {', '.join(of_levels)}" for pair, of_levels in said.items()]
    tables = {"Differences": changes, "Accuracy of every arm": rows}
    return Findings(sentences + left_out, tables, {"dose": [row for row in doses if row["difference"]], "along": rows})


def worth(records: Sequence[Record], pairs: Sequence[str], along: str | None = None) -> Findings:
    """How many more real images would have done as much as the generated ones: the first pair's second arm makes the learning curve."""
    first, second = arms_of(pairs[0])
    levels, rows, points = [], [], []
    for value, group in by_level(records, along).items():
        images = float(np.mean([record.about["trained"][second]["real"] for record in group]))
        predictions = pool(group)
        of_set = {record.name: str({key: said for key, said in record.about["vary"].items() if key != along}) for record in group}
        levels.append(Level(value, images, predictions.assign(set=predictions.scope.map(of_set))))
        for arm in (first, second):
            points.append({along: value, "real images": images, "arm": arm, **_accuracy(predictions[predictions.arm == arm])})
    mixed = by_run(_mixed_in(records, pairs[0]))
    alone = [f"{run}: no generated image could be mixed in, so there {first} and {second} are one training" for run in by_run(records) if run not in mixed]
    sentences = []
    for level, found in zip(levels, worth_of(levels, first, second)):
        rows.append({along: level.value, "real images": level.images, "worth": {"value": found.images, "ci95": found.ci95, "unit": IMAGES}})
        sentences.append(f"with {level.images:.0f} real images {first} is worth {found.said}")
    tables = {f"What {first} is worth, in real images more for {second}": rows, "Learning curves": points}
    return Findings(sentences + alone, tables, {"learning": points})


def pooled(records: Sequence[Record], pairs: Sequence[str], along: str | None = None) -> Findings:
    """All held-out predictions of all runs, scopes and seeds together."""
    predictions = pool(records)
    rows, left_out = differences(records, pairs)
    changes, sentences = [], []
    for pair in pairs:
        if not (mixed := _mixed_in(records, pair)):
            sentences.append(f"{pair}: nothing to say, for no run had a generated image to mix in")
            continue
        of_pair = [row for row in rows if row["pair"] == pair]
        overall = {"source": "all", "pair": pair, **_difference(mixed, pair)}
        changes.append(overall | {"mean over runs": over_runs(of_pair)})
        judged = pool(mixed)
        if judged.source.nunique() > 1:
            changes += [{"source": source, "pair": pair, **_paired(of_source, pair)} for source, of_source in judged.groupby("source")]
        said, basis = _headline(overall, of_pair, len(by_run(records)))
        sentences.append(f"{pair}: {words(said)} points, {_verdict(said, *arms_of(pair))}; half-width {_half(said)}, over {basis}")
    if any(record.about["scope"] != "split" for record in records):
        sentences.append("folds share training images, which no interval of one cross-validation can account for: these are too narrow by an unknown amount")
    arms = [{"source": "all", "arm": arm, **_accuracy(of_arm)} for arm, of_arm in by_arm(predictions)]
    if predictions.source.nunique() > 1:
        by_source = [(source, *pair) for source, of_source in predictions.groupby("source") for pair in by_arm(of_source)]
        arms += [{"source": source, "arm": arm, **_accuracy(of_arm)} for source, arm, of_arm in by_source]
    by_seed = [
        {"arm": arm, "seed": int(seed), **_accuracy(of_seed)} for arm, of_arm in by_arm(predictions) for seed, of_seed in of_arm.groupby("seed")
        if seed != NO_SEED
    ]  # fmt: skip
    tables = {"Differences": changes, "Accuracy of every arm": arms, "Every run by itself": rows, "Every seed by itself": by_seed}
    if len({row["run"] for row in rows}) < 2:
        del tables["Every run by itself"]
    return Findings(sentences + left_out, tables, {"forest": [row for row in arms if row["source"] == "all"], "by_run": rows})


QUESTIONS = {"calibration": calibration, "dose": dose, "worth": worth, "pooled": pooled}


def pool(records: Sequence[Record]) -> pd.DataFrame:
    """The labelled rows of all records; `scope` is the record's name, for its trainings are its own. ValueError where an arm and seed answer an image in
    two of them: such runs are no further patients."""
    rows = pd.concat([record.predictions.assign(scope=record.name, patient=_patients(record)) for record in records], ignore_index=True)
    twice = rows[rows.duplicated(["arm", "seed", "key"], keep=False)].sort_values(["key", "scope"])
    if len(twice):
        both = " and ".join(twice.scope.unique()[:2])
        raise ValueError(
            f"{both} judge on the same image {twice.key.iloc[0]}: they cannot be pooled, for that would count it twice. Vary what they differ in by "
            "`along`, or make a study of each"
        )
    return rows[rows.label != UNLABELLED]


def _patients(record: Record) -> pd.Series:
    """Patients as they are known over all records: other data may have given the same name to somebody else."""
    named = record.predictions.patient
    return named.where(named.isna(), str(record.about.get("data", "")) + " " + named.astype(str))


def differences(records: Sequence[Record], pairs: Sequence[str]) -> tuple[list[dict], list[str]]:
    """(a row for each run and pair: its difference over all its scopes; a sentence for each pair and run that is left out). Runs of one scope share what
    they say of how much trainings differ: two seeds of one run say next to nothing, of twenty runs enough."""
    rows, left_out, runs = [], [], by_run(records)
    of_one_scope = [group for group in runs.values() if len(group) == 1]
    recipes = {pair: trainings([pool(group) for group in of_one_scope if _mixed_in(group, pair)], *arms_of(pair)) for pair in pairs}
    for run, group in runs.items():
        for pair in pairs:
            if len(_mixed_in(group, pair)) < len(group):
                left_out.append(f"{run} is left out of {pair}: no generated image could be mixed in, so both arms are one training")
            else:
                rows.append({"run": run, "pair": pair, **_paired(pool(group), pair, recipes[pair] if len(group) == 1 else None)})
    return rows, left_out


def by_run(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.about["run"], []).append(record)
    return groups


def by_level(records: Sequence[Record], along: str) -> dict:
    """The records at each value of the varied key `along`, in rising order."""
    groups: dict = {}
    for record in records:
        groups.setdefault(record.about["vary"][along], []).append(record)
    return dict(sorted(groups.items()))


def over_runs(rows: Sequence[dict]) -> dict | None:
    """Mean of the rows' differences and Student's interval over runs, None for fewer than two."""
    values = np.array([row["difference"]["value"] for row in rows])
    if len(values) < 2:
        return None
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return {"value": float(values.mean()), "ci95": [float(values.mean() - half), float(values.mean() + half)], "unit": POINTS}


def _headline(overall: dict, of_runs: Sequence[dict], runs: int) -> tuple[dict | None, str]:
    """(the figure that a sentence gives, over what): of `runs` that each have their data, labeller and generator the mean, for it says what another such run
    would, and the pooled interval speaks of these generators alone. Which of the two does not depend on how many runs are left."""
    if runs < SETS:
        return overall["difference"], f"{overall['images']} images"
    return over_runs(of_runs), f"{len(of_runs)} runs" if len(of_runs) == runs else f"{len(of_runs)} of {runs} runs"


def _verdict(figure: dict | None, first: str, second: str) -> str:
    if figure is None:
        return "too few runs to say"
    low, high = figure["ci95"]
    return f"{first} is better" if low > 0 else f"{first} is worse" if high < 0 else f"no difference from {second} could be shown"


def _half(figure: dict | None) -> str:
    return "–" if figure is None else f"{50 * np.ptp(figure['ci95']):.1f}"


def _share_generated(records: Sequence[Record], arm: str) -> int:
    """Generated images that the arm trained on, in % of the real ones."""
    trained = [record.about["trained"][arm] for record in records]
    return round(100 * sum(of_run["generated"] for of_run in trained) / sum(of_run["real"] for of_run in trained))


def _generated(records: Sequence[Record], pair: str) -> str:
    """Of how many distinct generated images the pair's arms were trained, in the run with fewest and in that with most."""
    trained = [record.about["trained"][arm] for record in records for arm in arms_of(pair) if arm not in REAL and arm in record.about["trained"]]
    counts = [of_arm["generated"] for of_arm in trained]
    return "–" if not counts else f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def words(figure: dict | None) -> str:
    """A figure with its interval, as it is printed: "71.5 [68.8, 74.0]", "+4.2 [1.7, 6.6]"; an end that nobody knows is a dash."""
    if figure is None:
        return "–"
    scale, sign = (1, "+") if figure["unit"] == IMAGES else (100, "+" if figure["unit"] == POINTS else "")
    ends = ["–" if end is None else f"{scale * end:.{0 if scale == 1 else 1}f}" for end in figure["ci95"]]
    value = "–" if figure["value"] is None else f"{scale * figure['value']:{sign}.{0 if scale == 1 else 1}f}"
    return f"{value} [{', '.join(ends)}]".replace("-", "\N{MINUS SIGN}")


def _mixed_in(records: Sequence[Record], pair: str) -> list[Record]:
    """The records in which the pair's arms did train on generated images, where they are to. All of a run's, or none."""
    wanted = [arm for arm in arms_of(pair) if arm not in REAL]
    without = {record.about["run"] for record in records for arm in wanted if record.about["trained"].get(arm, {}).get("generated") == 0}
    return [record for record in records if record.about["run"] not in without]


def _difference(records: Sequence[Record], pair: str) -> dict:
    if not records:
        return {"difference": None, "images": 0, "patients": 0}
    return _paired(pool(records), pair)


def _paired(predictions: pd.DataFrame, pair: str, recipe: Trainings | None = None) -> dict:
    found = paired_difference(predictions, *arms_of(pair), recipe)
    return {"difference": {"value": found["difference"], "ci95": found["ci95"], "unit": POINTS}, "images": found["images"], "patients": found["patients"]}


def _accuracy(predictions: pd.DataFrame) -> dict:
    found = accuracy(predictions)
    return {"accuracy": {"value": found["accuracy"], "ci95": found["ci95"], "unit": PERCENT}, "images": found["images"], "patients": found["patients"]}


def _share(count: int, of: int) -> dict | None:
    if not of:
        return None
    interval = stats.binomtest(count, of).proportion_ci(LEVEL, method="exact")
    return {"value": count / of, "ci95": [float(interval.low), float(interval.high)], "unit": PERCENT}

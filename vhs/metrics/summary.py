"""The run's figures in one dictionary, and what they say in one sentence."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pandas as pd

from vhs.arms import PRIMARY, reported
from vhs.metrics.classification import auroc, calibration_error
from vhs.metrics.intervals import accuracy, balanced_accuracy, detectable, paired_difference
from vhs.metrics.predictions import HELD_OUT, NO_SEED, UNLABELLED, VALIDATION, by_arm, judged, of_test_part, out_of_fold


def summary(
    predictions: pd.DataFrame, *, labeller: dict | None = None, generated: dict | None = None, likeness: dict | None = None,
    generators: dict[str, dict] | None = None, purpose: str = "confirmatory", corrected: bool = False, patients_known: bool = True,
    unmixed: Collection[tuple[str, str]] = (), primary: Sequence[str] = PRIMARY,
) -> dict:  # fmt: skip
    """The run's figures, fractions in 0..1, ready for summary.json.

        {"purpose": "confirmatory" | "descriptive", "corrected": bool, "patients_known": bool, "unlabelled": test images without a label,
         "arms": {ARM: {"test": FIGURES | None, "validation": FIGURES | None, "cv": {**FIGURES, "folds"} | None, "seeds": [int]}},
         "paired": {"arms": [first, second], "from": "test" | "cv", "difference", "ci95", "images", "patients", "seeds", "from_trainings"} | None,
         "differences": [the same of each of vhs.arms.reported],
         "labeller": {...} | None, "generated": {...} | None, "generators": {NAME: {...}}, "likeness": {...} | None}

    FIGURES is {"accuracy", "ci95": [low, high], "balanced_accuracy", "balanced_ci95", "auroc", "ece", "images", "patients"}; auroc and ece are
    None for an arm that gives no probabilities. "test" and "validation" are of scope "split", None where the part has no labelled image;
    "cv" pools the out-of-fold predictions of scopes "fold-k". "paired" comes from the test part, from the folds where that has no labels, and
    is None unless both arms are there and neither is in `unmixed` with a scope that it rests on: (arm, scope) where no image was there to mix in.
    `purpose` is the plan's; `corrected`: a person changed generated labels after the held-out images had been judged.
    `labeller`, `generated`, `likeness`: see labeller_quality, generated_counts, jobs/likeness.py. `generators`: of each generator outside of the run
    generated_counts and "trained_on", how many of the data's images.
    """
    arms = {}
    for arm, rows in by_arm(predictions):
        inner = rows[(rows.scope == "split") & (rows.role == VALIDATION) & (rows.label != UNLABELLED)]
        folds = out_of_fold(rows)
        cv = {**_figures(folds), "folds": int(folds.scope.nunique())} if len(folds) else None
        seeds = sorted(int(seed) for seed in rows.seed.unique() if seed != NO_SEED)
        arms[arm] = {"test": _figures(of_test_part(rows)), "validation": _figures(inner), "cv": cv, "seeds": seeds}
    unlabelled = predictions[(predictions.role == HELD_OUT) & (predictions.label == UNLABELLED)].key.nunique()
    return {
        "purpose": purpose, "corrected": corrected, "patients_known": bool(patients_known), "unlabelled": int(unlabelled), "arms": arms,
        "paired": _paired(predictions, unmixed, primary),
        "differences": [found for pair in reported(arms) if (found := _paired(predictions, unmixed, pair))],
        "labeller": labeller, "generated": generated, "generators": generators or {}, "likeness": likeness,
    }  # fmt: skip


def _figures(rows: pd.DataFrame) -> dict | None:
    if rows.empty:
        return None
    plain = accuracy(rows)
    counts = {name: plain.pop(name) for name in ("images", "patients")}
    return {**plain, **balanced_accuracy(rows), "auroc": auroc(rows), "ece": calibration_error(rows), **counts}


def _paired(predictions: pd.DataFrame, unmixed: Collection[tuple[str, str]], primary: Sequence[str]) -> dict | None:
    part, rows = judged(predictions)
    if not set(primary) <= set(rows.arm) or any(arm in primary and scope in set(rows.scope) for arm, scope in unmixed):
        return None
    found = paired_difference(rows, *primary)
    return {"from": part, **{name: found[name] for name in ("arms", "difference", "ci95", "images", "patients", "seeds", "from_trainings")}}


def verdict(summary: dict) -> str:
    """One sentence on whether generation helped, read off the interval of the primary comparison. It only describes where that was planned, where labels
    were corrected once it could be known what helps, and with one seed: by how much trainings differ is not in the interval, and equal arms would be told
    apart too often."""
    sentence = _sentence(summary["paired"]) if summary["paired"] else f"No verdict: {_why_none(summary['arms'])}"
    once = summary["paired"] and summary["paired"].get("seeds") == 1
    describes = once or summary.get("corrected") or summary["purpose"] == "descriptive"  # a former version's has no `corrected`
    return f"Descriptive: {sentence[0].lower()}{sentence[1:]}" if describes else sentence


def _why_none(arms: dict) -> str:
    if not any(arm["test"] or arm["cv"] for arm in arms.values()):
        return "the test part has no labels and no folds were run"
    if not set(PRIMARY) <= set(arms):
        return f"none was planned, for {PRIMARY[0]} is not among the arms of this run"
    return f"no generated image could be mixed in, so {PRIMARY[0]} and {PRIMARY[1]} are one training"


def _sentence(paired: dict) -> str:
    low, high = paired["ci95"]
    said = "Generation helped" if low > 0 else "Generation hurt" if high < 0 else "No difference could be shown"
    where, what = ("", "this test set") if paired["from"] == "test" else (" out of fold, for the test part lacks labels", "these folds")
    once = "; each arm was trained once, and what another training would say is not in it" if paired.get("seeds") == 1 else ""
    more = "; most of that is how trainings differ: more seeds would tell, not more images" if paired.get("from_trainings", 0) > 0.5 else ""
    found = f"{100 * paired['difference']:+.1f} points [{100 * low:.1f}, {100 * high:.1f}]{where}"
    return f"{said}: {found}; {what} would find {100 * detectable((low, high)):.1f} points four times in five{more}{once}"

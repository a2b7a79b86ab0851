"""Predictions in, figures with honest intervals out.

One row of a predictions table is one classifier's word on one image: key, arm, scope, seed, patient, source, label, predicted (positions in
CLASSES), p_small, p_normal, p_large, index (the true VHS or CTR, NaN where unknown). A missing patient means that the image is its own. An
arm that trains nothing (measure) has one row an image and the seed NO_SEED.

Several seeds of one arm give an image a correctness between 0 and 1, the mean over seeds; an interval then speaks of new patients judged by
these trained classifiers, not of new trainings, so figures for each seed are tabled beside it. Images of one patient are not independent;
both intervals rest on the cluster-robust variance of a mean (Cameron & Miller, J Human Resources 50:317, 2015):

    one accuracy       Wilson's score interval on the effective sample size n / design effect: of the intervals for clustered proportions
                       compared by Dean & Pagano (J Survey Statistics and Methodology 3:484, 2015) one that keeps its coverage near 0 and 1;
                       with the factor for few patients of Korn & Graubard (Survey Methodology 24:193, 1998). With one image a patient and
                       one seed it is Wilson's interval itself.
    paired difference  Bonett & Price's adjusted Wald interval (J Educ Behav Stat 37:479, 2012; recommended by Fagerland et al., Stat Med
                       33:2850, 2014): two further images, one that only the first arm gets right and one that only the second does, each
                       its own patient; then mean -+ t s.e. with patients - 1 degrees of freedom. Equal answers still leave a width.

Pooled out-of-fold predictions share training images between folds, which no interval from one cross-validation can account for (Bengio &
Grandvalet, JMLR 5:1089, 2004): `cv` figures describe, the test part decides.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from vhs.measure import CLASSES, View

ARMS = {  # in the order every table and figure shows them
    "real": "real images as they are, the study's baseline",
    "real-matched": "real images only, drawn with mixed's class prior, optimizer steps, initial weights and augmentation",
    "mixed": "real and generated images together",
    "pretrain": "first generated images, then real ones",
    "measure": "no classifier: the labeller's index cut at the class edges",
}
NO_SEED = -1
PRIMARY = ("mixed", "real-matched")
LEVEL = 0.95
_Z = stats.norm.ppf((1 + LEVEL) / 2)


def joined_once(predictions: pd.DataFrame, expected_keys: Collection[str]) -> pd.DataFrame:
    """The same rows ordered by arm, seed and key, after checking that every arm and seed answers each expected key exactly once.

    Raises ValueError naming the keys that are repeated, missing or not expected: an evaluation over a part of the images is no evaluation.
    """
    expected = set(expected_keys)
    for (arm, seed), keys in predictions.groupby(["arm", "seed"]).key:
        repeated, answered = set(keys[keys.duplicated()]), set(keys)
        found = {"more than once": repeated, "not at all": expected - answered, "without being asked": answered - expected}
        if wrong := [f"{len(some)} {how} ({', '.join(sorted(some)[:3])}{', …' * (len(some) > 3)})" for how, some in found.items() if some]:
            what = f"arm {arm}, seed {seed} answers {'; '.join(wrong)} of {len(expected)} keys"
            raise ValueError(f"{what}: remove its predictions and evaluate it again")
    return predictions.sort_values(["arm", "seed", "key"], ignore_index=True)


def accuracy(predictions: pd.DataFrame) -> dict:
    """Accuracy of one arm's rows -> {"accuracy", "ci95": [low, high], "images", "patients"}, fractions in 0..1."""
    correct, patient = _correctness(predictions)
    p, n = float(correct.mean()), len(correct)
    # A patient's images that happen to disagree are no gain: the interval is at least as wide as if each image were its own patient.
    variance = max(_clustered_variance(correct.to_numpy(), clusters) for clusters in (patient.to_numpy(), correct.index))
    few = stats.t.ppf((1 + LEVEL) / 2, max(1, n - 1)) / stats.t.ppf((1 + LEVEL) / 2, max(1, patient.nunique() - 1))
    # Equal answers everywhere leave no variance to estimate a design effect from: then each patient counts once.
    size = few**2 * p * (1 - p) * n / (n - 1) / variance if variance > 1e-12 else patient.nunique()
    centre = (p + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * np.sqrt(p * (1 - p) / size + _Z**2 / (4 * size**2))
    ci95 = [float(max(0, min(p, centre - half))), float(min(1, max(p, centre + half)))]  # rounding alone can leave p outside
    return {"accuracy": p, "ci95": ci95, "images": n, "patients": int(patient.nunique())}


def paired_difference(predictions: pd.DataFrame, first: str = PRIMARY[0], second: str = PRIMARY[1]) -> dict:
    """Accuracy of arm `first` minus arm `second` on the same images -> {"arms", "difference", "ci95", "discordance", "images", "patients"}.

    `discordance` is the mean squared difference an image: with one seed, the share of images that exactly one of the arms gets right.
    Raises ValueError if the arms did not answer the same keys.
    """
    (a, patient), (b, _) = (_correctness(predictions[predictions.arm == arm]) for arm in (first, second))
    if odd := sorted(a.index.symmetric_difference(b.index)):
        what = f"{len(odd)} keys ({odd[0]} first) have an answer of only one of {first} and {second}"
        raise ValueError(f"{what}: evaluate both arms on the same images")
    difference = (a - b.reindex(a.index)).to_numpy()
    padded, owners = np.append(difference, (1.0, -1.0)), pd.factorize(patient)[0]
    owners = np.append(owners, (owners.max() + 1, owners.max() + 2))
    half = stats.t.ppf((1 + LEVEL) / 2, owners.max()) * np.sqrt(_clustered_variance(padded, owners))
    ci95 = [float(max(-1, padded.mean() - half)), float(min(1, padded.mean() + half))]
    return {
        "arms": [first, second], "difference": float(difference.mean()), "ci95": ci95,
        "discordance": float((difference**2).mean()), "images": len(difference), "patients": int(patient.nunique()),
    }


def minimum_detectable(n: int, discordance: float) -> float:
    """Half-width of the 95% interval of a paired difference over n independent images, a fraction: what a test set of this size could show.

    A true difference of this size is found significant about every second time; 1.43 times as much is found four times in five.
    """
    return float(_Z * np.sqrt(discordance / n))


def verdict(paired: dict | None) -> str:
    """One sentence on whether generation helped, read off the interval of the primary comparison."""
    if paired is None:
        return "No verdict: mixed and real-matched were not both trained as planned"
    low, high = (100 * bound for bound in paired["ci95"])
    figures = f"{100 * paired['difference']:+.1f} points [{low:.1f}, {high:.1f}]"
    if low > 0:
        return f"Generation helped: {figures}"
    if high < 0:
        return f"Generation hurt: {figures}"
    return f"No difference could be shown: {figures}; this test set could have detected about {(high - low) / 2:.1f} points"


def accuracy_by(predictions: pd.DataFrame, column: str) -> pd.DataFrame:
    """Accuracy of every arm within each value of `column`: arm, <column>, images, patients, accuracy, low, high. By label: recall."""
    rows = []
    for arm, of_arm in _by_arm(predictions):
        for value, group in of_arm.groupby(column, observed=True):
            result = accuracy(group)
            low, high = result.pop("ci95")
            rows.append({"arm": arm, column: value, **result, "low": low, "high": high})
    return pd.DataFrame(rows, columns=["arm", column, "images", "patients", "accuracy", "low", "high"])


def near_boundary(predictions: pd.DataFrame, view: View) -> pd.DataFrame:
    """Accuracy near a class edge (true index within one bin of it) and far from it: arm, zone, images, patients, accuracy, low, high.

    Images without a true index are left out: near an edge the label itself is doubtful, and that is where classifiers differ.
    """
    known = predictions[predictions["index"].notna()]
    distance = np.abs(known["index"].to_numpy()[:, None] - np.array(view.edges)).min(axis=1)
    near, far = f"within {view.bin_width:g} {view.index} of an edge", "farther away"
    return accuracy_by(known.assign(zone=pd.Categorical(np.where(distance <= view.bin_width + 1e-9, near, far), [near, far])), "zone")


def confusion(predictions: pd.DataFrame) -> pd.DataFrame:
    """Images of each true and predicted class, mean over seeds, for every arm: arm, class, and one column of counts for each of CLASSES."""
    rows = []
    for arm, of_arm in _by_arm(predictions):
        counts = np.zeros((len(CLASSES), len(CLASSES)))
        np.add.at(counts, (of_arm.label, of_arm.predicted), 1 / of_arm.seed.nunique())
        rows += [{"arm": arm, "class": name, **dict(zip(CLASSES, row))} for name, row in zip(CLASSES, counts.tolist())]
    return pd.DataFrame(rows, columns=["arm", "class", *CLASSES])


def labeller_quality(measured: pd.DataFrame, view: View) -> dict:
    """Held-out images' label, index (true or NaN), measured -> {"index_mae" (None if no true index is known), "class_accuracy"}."""
    error = (measured["measured"] - measured["index"]).abs().dropna()
    return {
        "index_mae": float(error.mean()) if len(error) else None,
        "class_accuracy": float((view.classify(measured["measured"]) == measured.label.to_numpy()).mean()),
    }


def generated_counts(generated: pd.DataFrame, asked: int) -> dict:
    """Generated images' prompted, measured (class positions), accepted (bool) -> {"asked", "produced", "accepted", "agreement"}.

    `agreement` is the share of all produced images whose measured class is the prompted one, None if nothing was produced.
    """
    agreement = float((generated.prompted == generated.measured).mean()) if len(generated) else None
    return {"asked": int(asked), "produced": len(generated), "accepted": int(generated.accepted.sum()), "agreement": agreement}


def generated_tables(generated: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Counts by prompted, measured, accepted, reason: "rejections" (measured class x outcome), "agreement" (prompted x measured)."""
    named = generated.assign(prompted=_named(generated.prompted), measured=_named(generated.measured))
    named["outcome"] = generated.reason.where(~generated.accepted, "accepted")
    rejections = pd.crosstab(named.measured, named.outcome, dropna=False).reindex(CLASSES, fill_value=0)
    rejections = rejections[["accepted"] * ("accepted" in rejections) + sorted(rejections.columns.drop("accepted", errors="ignore"))]
    agreement = pd.crosstab(named.prompted, named.measured, dropna=False).reindex(index=CLASSES, columns=CLASSES, fill_value=0)
    found = {"rejections": rejections.rename_axis("measured class"), "agreement": agreement.rename_axis("prompted class")}
    return {name: table.rename_axis(columns=None).reset_index() for name, table in found.items()}


def tables(predictions: pd.DataFrame, view: View) -> dict[str, pd.DataFrame]:
    """The page's tables over the rows of one scope: "by_source", "by_class", "near_boundary", "by_seed", "confusion"."""
    by_class = accuracy_by(predictions, "label").rename(columns={"label": "class"})
    by_seed = accuracy_by(predictions[predictions.seed != NO_SEED], "seed")
    return {
        "by_source": accuracy_by(predictions, "source"), "by_class": by_class.assign(**{"class": _named(by_class["class"])}),
        "near_boundary": near_boundary(predictions, view), "by_seed": by_seed, "confusion": confusion(predictions),
    }


def summary(predictions: pd.DataFrame, *, labeller: dict | None, generated: dict | None, primary: Sequence[str] = PRIMARY) -> dict:
    """The run's figures, fractions in 0..1, ready for summary.json.

        {"arms": {ARM: {"test": {"accuracy", "ci95": [low, high]}, "cv": {"accuracy", "ci95", "folds"} | None, "seeds": [int]}},
         "paired": {"arms": [first, second], "difference", "ci95"} | None,
         "labeller": {"index_mae", "class_accuracy"} | None, "generated": {"asked", "produced", "accepted", "agreement"} | None}

    "test" reads scope "split"; "cv" pools the out-of-fold predictions of scopes "fold-k". "paired" is None unless both arms are there.
    `labeller` and `generated` come from `labeller_quality` and `generated_counts`.
    """
    arms = {}
    for arm, rows in _by_arm(predictions):
        test, folds = rows[rows.scope == "split"], rows[rows.scope != "split"]
        if test.empty:
            what = f"arm {arm} has no predictions of scope 'split', only of {', '.join(sorted(folds.scope.unique()))}"
            raise ValueError(f"{what}: evaluate it on the test part")
        cv = {**_figures(folds), "folds": int(folds.scope.nunique())} if len(folds) else None
        arms[arm] = {"test": _figures(test), "cv": cv, "seeds": sorted(int(seed) for seed in rows.seed.unique() if seed != NO_SEED)}
    paired = None
    if set(primary) <= set(arms):
        found = paired_difference(predictions[predictions.scope == "split"], *primary)
        paired = {name: found[name] for name in ("arms", "difference", "ci95")}
    return {"arms": arms, "paired": paired, "labeller": labeller, "generated": generated}


def _by_arm(predictions: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(arm, its rows) in the order of ARMS, others after them by name."""
    order = list(ARMS)
    return sorted(predictions.groupby("arm"), key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair[0]))


def _figures(rows: pd.DataFrame) -> dict:
    result = accuracy(rows)
    return {"accuracy": result["accuracy"], "ci95": result["ci95"]}


def _correctness(predictions: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """(share of seeds that get the image right, patient), both by key."""
    if predictions.empty:
        raise ValueError("no predictions to judge: the table has no row of this arm")
    owner = predictions.patient.astype(object).where(predictions.patient.notna(), predictions.key)
    by_key = predictions.assign(correct=predictions.predicted == predictions.label, owner=owner).groupby("key")
    return by_key.correct.mean(), by_key.owner.first()


def _clustered_variance(values: np.ndarray, clusters: np.ndarray) -> float:
    """Variance of the mean of `values` [n] when those of one cluster may depend on each other; 0 for a single cluster."""
    codes = pd.factorize(clusters)[0]
    sums, m = np.bincount(codes, weights=values - values.mean()), codes.max() + 1
    return float(m / (m - 1) * (sums**2).sum() / len(values) ** 2) if m > 1 else 0.0


def _named(labels: pd.Series) -> pd.Series:
    return labels.map(lambda label: CLASSES[label])

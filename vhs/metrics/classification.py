"""What an accuracy hides: which images are got right, which classes are mistaken for which, and whether the probabilities mean anything."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vhs.measure import CLASSES, View
from vhs.metrics.intervals import accuracy
from vhs.metrics.predictions import NO_SEED, by_arm

PROBABILITIES = [f"p_{name}" for name in CLASSES]
CALIBRATION_BINS = 15


def accuracy_by(predictions: pd.DataFrame, column: str) -> pd.DataFrame:
    """Accuracy of every arm within each value of `column`: arm, <column>, images, patients, accuracy, low, high. By label: recall."""
    rows = []
    for arm, of_arm in by_arm(predictions):
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
    for arm, of_arm in by_arm(predictions):
        counts = np.zeros((len(CLASSES), len(CLASSES)))
        np.add.at(counts, (of_arm.label, of_arm.predicted), 1 / of_arm.seed.nunique())
        rows += [{"arm": arm, "class": name, **dict(zip(CLASSES, row))} for name, row in zip(CLASSES, counts.tolist())]
    return pd.DataFrame(rows, columns=["arm", "class", *CLASSES])


def auroc(predictions: pd.DataFrame) -> float | None:
    """Area under the ROC curve of one arm's rows: one class against the rest, mean over classes, then over seeds. None where it means nothing:
    a measure's probabilities are zeros and ones, and a class may have no image."""
    from sklearn.metrics import roc_auc_score

    seeds = [rows for seed, rows in predictions.groupby("seed") if seed != NO_SEED]
    if not seeds or any(rows.label.nunique() < len(CLASSES) for rows in seeds):
        return None
    areas = [roc_auc_score(np.eye(len(CLASSES))[rows.label], rows[PROBABILITIES].to_numpy(), average="macro") for rows in seeds]
    return float(np.mean(areas))


def calibration_error(predictions: pd.DataFrame) -> float | None:
    """Expected calibration error of one arm's rows (Guo et al. 2017, arXiv:1706.04599, eq. 3), mean over seeds; None for a measure.

    How far the probability of the predicted class is from its accuracy, on average, over CALIBRATION_BINS bins of equal width. It is
    biased upwards on few images: a comparison between arms, no absolute figure.
    """
    errors = []
    for _, rows in predictions[predictions.seed != NO_SEED].groupby("seed"):
        confidence, correct = rows[PROBABILITIES].to_numpy(dtype=float).max(axis=1), (rows.predicted == rows.label).to_numpy()
        bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
        gaps = np.bincount(bins, weights=correct - confidence, minlength=CALIBRATION_BINS)
        errors.append(np.abs(gaps).sum() / len(rows))
    return float(np.mean(errors)) if errors else None


def tables(predictions: pd.DataFrame, view: View) -> dict[str, pd.DataFrame]:
    """The page's tables over the judged rows: "by_source", "by_class", "near_boundary", "by_seed", "confusion"."""
    by_class = accuracy_by(predictions, "label").rename(columns={"label": "class"})
    by_seed = accuracy_by(predictions[predictions.seed != NO_SEED], "seed")
    return {
        "by_source": accuracy_by(predictions, "source"), "by_class": by_class.assign(**{"class": by_class["class"].map(CLASSES.__getitem__)}),
        "near_boundary": near_boundary(predictions, view), "by_seed": by_seed, "confusion": confusion(predictions),
    }  # fmt: skip

"""Accuracies and their difference, with intervals that know which images belong together.

Several seeds of one arm give an image a correctness between 0 and 1, the mean over seeds; an interval then speaks of new patients judged by
these trained classifiers, not of new trainings, so figures for each seed are tabled beside it. Images of one patient are not independent;
all intervals rest on the cluster-robust variance of a mean (Cameron & Miller, J Human Resources 50:317, 2015):

    one accuracy       Wilson's score interval on the effective sample size n / design effect: of the intervals for clustered proportions
                       compared by Dean & Pagano (J Survey Statistics and Methodology 3:484, 2015) one that keeps its coverage near 0 and 1;
                       with the factor for few patients of Korn & Graubard (Survey Methodology 24:193, 1998). With one image a patient and
                       one seed it is Wilson's interval itself.
    balanced accuracy  the mean of the classes' recalls, a stratified mean: the same interval with that mean's variance.
    paired difference  Bonett & Price's adjusted Wald interval (J Educ Behav Stat 37:479, 2012; recommended by Fagerland et al., Stat Med
                       33:2850, 2014): two further images, one that only the first arm gets right and one that only the second does, each
                       its own patient; then mean -+ t s.e. with patients - 1 degrees of freedom. Equal answers still leave a width.

Pooled out-of-fold predictions share training images between folds, which no interval from one cross-validation can account for (Bengio &
Grandvalet, JMLR 5:1089, 2004): `cv` figures describe, the test part decides.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from vhs.arms import PRIMARY
from vhs.metrics.predictions import owners

LEVEL = 0.95
_Z = stats.norm.ppf((1 + LEVEL) / 2)


def accuracy(predictions: pd.DataFrame) -> dict:
    """Accuracy of one arm's rows -> {"accuracy", "ci95": [low, high], "images", "patients"}, fractions in 0..1."""
    images = _correctness(predictions)
    p, n, patients = float(images.correct.mean()), len(images), images.patient.nunique()
    ci95 = _wilson(p, ((images.correct - p) / n).to_numpy(), images, fallback=patients)
    return {"accuracy": p, "ci95": ci95, "images": n, "patients": int(patients)}


def balanced_accuracy(predictions: pd.DataFrame) -> dict:
    """Mean of the recalls of the classes that occur among one arm's rows -> {"balanced_accuracy", "balanced_ci95": [low, high]}."""
    images = _correctness(predictions)
    of_class = images.groupby("label")
    recall, size, patients = of_class.correct.mean(), of_class.size(), of_class.patient.nunique()
    p, label = float(recall.mean()), images.label
    influence = (images.correct - label.map(recall)) / (label.map(size) * len(recall))
    ci95 = _wilson(p, influence.to_numpy(), images, fallback=len(recall) ** 2 / (1 / patients).sum())
    return {"balanced_accuracy": p, "balanced_ci95": ci95}


def paired_difference(predictions: pd.DataFrame, first: str = PRIMARY[0], second: str = PRIMARY[1]) -> dict:
    """Accuracy of arm `first` minus arm `second` on the same images -> {"arms", "difference", "ci95", "discordance", "images", "patients"}.

    `discordance` is the mean squared difference an image: with one seed, the share of images that exactly one of the arms gets right.
    Raises ValueError if the arms did not answer the same keys.
    """
    a, b = (_correctness(predictions[predictions.arm == arm]) for arm in (first, second))
    if odd := sorted(a.index.symmetric_difference(b.index)):
        what = f"{len(odd)} keys ({odd[0]} first) have an answer of only one of {first} and {second}"
        raise ValueError(f"{what}: evaluate both arms on the same images")
    difference = (a.correct - b.correct.reindex(a.index)).to_numpy()
    padded, clusters = np.append(difference, (1.0, -1.0)), pd.factorize(a.patient)[0]
    clusters = np.append(clusters, (clusters.max() + 1, clusters.max() + 2))
    error = np.sqrt(_clustered_variance((padded - padded.mean()) / len(padded), clusters))
    half = stats.t.ppf((1 + LEVEL) / 2, clusters.max()) * error
    ci95 = [float(max(-1, padded.mean() - half)), float(min(1, padded.mean() + half))]
    return {
        "arms": [first, second], "difference": float(difference.mean()), "ci95": ci95,
        "discordance": float((difference**2).mean()), "images": len(difference), "patients": int(a.patient.nunique()),
    }  # fmt: skip


def minimum_detectable(n: int, discordance: float) -> float:
    """Half-width of the 95% interval of a paired difference over n independent images, a fraction: what a test set of this size could show.

    A true difference of this size is found significant about every second time; 1.43 times as much is found four times in five.
    """
    return float(_Z * np.sqrt(discordance / n))


def _correctness(predictions: pd.DataFrame) -> pd.DataFrame:
    """One row a key: `correct`, the share of seeds that get the image right, its `patient` and `label`."""
    if predictions.empty:
        raise ValueError("no predictions to judge: the table has no row of this arm")
    by_key = predictions.assign(correct=predictions.predicted == predictions.label, patient=owners(predictions)).groupby("key")
    return pd.DataFrame({"correct": by_key.correct.mean(), "patient": by_key.patient.first(), "label": by_key.label.first()})


def _wilson(p: float, influence: np.ndarray, images: pd.DataFrame, fallback: float) -> list[float]:
    """Wilson's interval about `p` on the sample size that its variance says it is worth, `fallback` where equal answers leave no variance.

    `influence` [n]: each image's share of the estimate's deviation, of sum 0; in a plain mean (value - mean) / n.
    """
    # A patient's images that happen to disagree are no gain: the interval is at least as wide as if each image were its own patient.
    n, variance = len(images), max(_clustered_variance(influence, clusters) for clusters in (images.patient, images.index))
    few = stats.t.ppf((1 + LEVEL) / 2, max(1, n - 1)) / stats.t.ppf((1 + LEVEL) / 2, max(1, images.patient.nunique() - 1))
    size = few**2 * p * (1 - p) * n / (n - 1) / variance if variance > 1e-12 else fallback
    centre = (p + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * np.sqrt(p * (1 - p) / size + _Z**2 / (4 * size**2))
    return [float(max(0, min(p, centre - half))), float(min(1, max(p, centre + half)))]  # rounding alone can leave p outside


def _clustered_variance(influence: np.ndarray, clusters) -> float:
    """Variance of an estimate from each image's influence on it, when those of one cluster may depend on each other; 0 for one cluster."""
    codes = pd.factorize(clusters)[0]
    sums, m = np.bincount(codes, weights=influence), codes.max() + 1
    return float(m / (m - 1) * (sums**2).sum()) if m > 1 else 0.0

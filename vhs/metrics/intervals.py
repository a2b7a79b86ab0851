"""Accuracies and their difference, with intervals that know which images belong together and that another training would have said otherwise.

Patients and trainings (seeds) are both a sample: an interval speaks of new patients like these judged by new trainings on the same images, as the field's
readers and cases do (multi-reader multi-case: Obuchowski & Rockette, Commun Stat Simul Comput 24:285, 1995; for binary answers Gallas et al., J Opt
Soc Am A 24:B70, 2007; that trainings vary as much as data do: Bouthillier et al., MLSys 2021). The variance of a mean has two parts:

    patients    cluster-robust (Cameron & Miller, J Human Resources 50:317, 2015), of each image's mean over its trainings
    trainings   by how much the estimates of single seeds differ, less what differs from image to image, which patients' part holds already; within each
                scope by itself, for a seed's number says nothing of another scope. Degrees of freedom by Hillis (Stat Med 26:596, 2007).

With one seed the second part is unknown, and the interval speaks of these trained classifiers alone. With two or three it is known badly, and widths jump;
runs of one recipe lend each other theirs (`trainings`). Degrees of freedom for patients are 1 / (sum of their squared shares) - 1: equal patients' number
less one, fewer where one patient has half of the images; one patient alone says nothing of others. On both parts rest

    one accuracy       Wilson's score interval on the effective sample size n / design effect: of the intervals for clustered proportions
                       compared by Dean & Pagano (J Survey Statistics and Methodology 3:484, 2015) one that keeps its coverage near 0 and 1;
                       with the factor for few degrees of freedom of Korn & Graubard (Survey Methodology 24:193, 1998). With one image a patient
                       and one seed it is Wilson's interval itself.
    balanced accuracy  the mean of the classes' recalls, a stratified mean: the same interval with that mean's variance, to which a class that is all right
                       or all wrong brings that of its recall (k + 1) / (n + 2), for a few equal answers are no certainty.
    paired difference  Bonett & Price's adjusted Wald interval (J Educ Behav Stat 37:479, 2012; recommended by Fagerland et al., Stat Med
                       33:2850, 2014): two further images, one that only the first arm gets right and one that only the second does, each
                       its own patient; then mean -+ t s.e. Equal answers still leave a width. Seeds are paired: of one seed, both arms begin alike.

Pooled out-of-fold predictions share training images between folds, which no interval from one cross-validation can account for (Bengio &
Grandvalet, JMLR 5:1089, 2004): `cv` figures describe, the test part decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from vhs.arms import PRIMARY
from vhs.metrics.predictions import NO_SEED, owners

LEVEL = 0.95
_Z = stats.norm.ppf((1 + LEVEL) / 2)
POWER = 1 + stats.norm.ppf(0.8) / _Z  # half-widths that a true difference has to have to be found four times in five


@dataclass(frozen=True)
class _Answers:
    """`correct` [images, seeds] 0 or 1, or a difference of two; NaN where a seed trained nothing in that image's scope. `images`: patient, label, scope, by
    key."""

    correct: np.ndarray
    images: pd.DataFrame

    @property
    def mean(self) -> np.ndarray:
        """[images], over the seeds that answered."""
        return np.nanmean(self.correct, 1)


def accuracy(predictions: pd.DataFrame) -> dict:
    """Accuracy of one arm's rows -> {"accuracy", "ci95": [low, high], "images", "patients"}, fractions in 0..1."""
    answers = _answers(predictions)
    p, n, patients = float(answers.mean.mean()), len(answers.images), answers.images.patient.nunique()
    ci95 = _wilson(p, np.full(n, p), np.full(n, 1 / n), answers, fallback=patients)
    return {"accuracy": p, "ci95": ci95, "images": n, "patients": int(patients)}


def balanced_accuracy(predictions: pd.DataFrame) -> dict:
    """Mean of the recalls of the classes that occur among one arm's rows -> {"balanced_accuracy", "balanced_ci95": [low, high]}."""
    answers = _answers(predictions)
    label = answers.images.label
    of_class = answers.images.assign(correct=answers.mean).groupby("label")
    recall, size, patients = of_class.correct.mean(), of_class.size(), of_class.patient.nunique()
    weight = 1 / (label.map(size) * len(recall))
    p = float(recall.mean())
    alike = size[(recall == 0) | (recall == 1)] if 0 < p < 1 else size[:0]
    of_alike = float(((alike + 1) / (alike + 2) ** 3).sum()) / len(recall) ** 2
    fallback = len(recall) ** 2 / (1 / patients).sum()
    ci95 = _wilson(p, label.map(recall).to_numpy(), weight.to_numpy(), answers, fallback, more=of_alike)
    return {"balanced_accuracy": p, "balanced_ci95": ci95}


@dataclass(frozen=True)
class Trainings:
    """How much the estimates of single seeds differ: their variance, the part of it that differs from image to image and is the patients' already, and the
    degrees of freedom that both rest on."""

    between: float
    within: float
    df: int


def trainings(runs: Sequence[pd.DataFrame], first: str, second: str) -> Trainings | None:
    """What `runs` of one recipe, each of one scope, say together of how much trainings change the difference of two arms; None if no seed was repeated."""
    found = []
    for predictions in runs:
        both = _both(predictions, first, second)
        found += _by_scope(np.full(len(both.images), 1 / len(both.images)), both)
    df = sum(one.df for _, one in found)
    mean = {name: sum(one.df * getattr(one, name) for _, one in found) / df for name in ("between", "within")} if df else {}
    return Trainings(**mean, df=df) if df else None


def paired_difference(predictions: pd.DataFrame, first: str = PRIMARY[0], second: str = PRIMARY[1], recipe: Trainings | None = None) -> dict:
    """Accuracy of arm `first` minus arm `second` on the same images -> {"arms", "difference", "ci95", "discordance", "images", "patients", "seeds",
    "from_trainings"}.

    `discordance` is the mean squared difference an image: with one seed, the share of images that exactly one of the arms gets right. `from_trainings`
    is the trainings' part of the variance, 0..1. `recipe`: what other runs say too of how much trainings differ, for predictions of one scope.
    Raises ValueError if the arms did not answer the same keys, or were trained with different seeds.
    """
    both = _both(predictions, first, second)
    difference, n = both.mean, len(both.images) + 2
    padded, clusters = np.append(difference, (1.0, -1.0)), pd.factorize(both.images.patient)[0]
    clusters = np.append(clusters, (clusters.max() + 1, clusters.max() + 2))
    influence = (padded - padded.mean()) / n
    of_patients = max(_clustered_variance(influence, one) for one in (clusters, np.arange(n)))
    variance, df = _with_trainings(of_patients, _freedom(np.full(n, 1 / n), clusters), np.full(n - 2, 1 / (n - 2)), both, recipe)
    half = stats.t.ppf((1 + LEVEL) / 2, df) * np.sqrt(variance)
    ci95 = [float(max(-1, padded.mean() - half)), float(min(1, padded.mean() + half))]
    return {
        "arms": [first, second], "difference": float(difference.mean()), "ci95": ci95,
        "discordance": float((difference**2).mean()), "images": len(difference), "patients": int(both.images.patient.nunique()),
        "seeds": both.correct.shape[1], "from_trainings": float(1 - of_patients / variance),
    }  # fmt: skip


def _both(predictions: pd.DataFrame, first: str, second: str) -> _Answers:
    """Arm `first`'s answers less arm `second`'s."""
    a, b = (_answers(predictions[predictions.arm == arm]) for arm in (first, second))
    if odd := sorted(a.images.index.symmetric_difference(b.images.index)):
        what = f"{len(odd)} keys ({odd[0]} first) have an answer of only one of {first} and {second}"
        raise ValueError(f"{what}: evaluate both arms on the same images")
    seeds = [sorted(set(predictions.seed[predictions.arm == arm])) for arm in (first, second)]
    if seeds[0] != seeds[1] and [NO_SEED] not in seeds:
        raise ValueError(f"{first} was trained with the seeds {seeds[0]} and {second} with {seeds[1]}: evaluate both with the same")
    return _Answers(a.correct - b.correct, a.images)  # both are in the order of keys; an arm that trains nothing answers every seed alike


def detectable(ci95: Sequence[float]) -> float:
    """The true difference, a fraction, that would be found significant four times in five where an interval of this width is drawn."""
    return POWER * (ci95[1] - ci95[0]) / 2


def minimum_detectable(n: int, discordance: float) -> float:
    """The true difference, a fraction, that is found significant four times in five over n images of as many patients: what a test set of this size could
    show at best, for by how much trainings differ comes on top."""
    return POWER * float(_Z * np.sqrt(discordance / n))


def _answers(predictions: pd.DataFrame) -> _Answers:
    if predictions.empty:
        raise ValueError("no predictions to judge: the table has no row of this arm")
    rows = predictions.assign(correct=(predictions.predicted == predictions.label).astype(float), patient=owners(predictions))
    by_seed = rows.pivot(index="key", columns="seed", values="correct")
    return _Answers(by_seed.to_numpy(), rows.drop_duplicates("key").set_index("key")[["patient", "label", "scope"]].loc[by_seed.index])


def _wilson(p: float, centre: np.ndarray, weight: np.ndarray, answers: _Answers, fallback: float, more: float = 0.0) -> list[float]:
    """Wilson's interval about `p` = sum(weight * answer) on the sample size that its variance says it is worth, `fallback` where equal answers leave no
    variance. `centre` [n]: what each image's answer deviates from, in a plain mean p. `more`: variance that the answers do not show."""
    # A patient's images that happen to disagree are no gain: the interval is at least as wide as if each image were its own patient.
    n, images, influence = len(weight), answers.images, (answers.mean - centre) * weight
    of_patients = more + max(_clustered_variance(influence, clusters) for clusters in (images.patient, images.index))
    variance, df = _with_trainings(of_patients, _freedom(weight, images.patient), weight, answers)
    few = stats.t.ppf((1 + LEVEL) / 2, max(1, n - 1)) / stats.t.ppf((1 + LEVEL) / 2, df)
    size = few**2 * p * (1 - p) * n / (n - 1) / variance if variance > 1e-12 else fallback
    centre = (p + _Z**2 / (2 * size)) / (1 + _Z**2 / size)
    half = _Z / (1 + _Z**2 / size) * np.sqrt(p * (1 - p) / size + _Z**2 / (4 * size**2))
    return [float(max(0, min(p, centre - half))), float(min(1, max(p, centre + half)))]  # rounding alone can leave p outside


def _with_trainings(of_patients: float, df: float, weight: np.ndarray, answers: _Answers, recipe: Trainings | None = None) -> tuple[float, float]:
    """(variance, degrees of freedom) of sum(weight * answer) once trainings count as a sample too, `of_patients` and `df` what they are without."""
    beyond = spread = 0.0
    for seeds, own in _by_scope(weight, answers):
        one = recipe or own
        beyond, spread = beyond + (one.between - one.within) / seeds, spread + (one.between / seeds) ** 2 / one.df
    if beyond <= 0:
        return of_patients, df
    variance = of_patients + beyond
    return variance, min(df, variance**2 / spread)


def _by_scope(weight: np.ndarray, answers: _Answers) -> list[tuple[int, Trainings]]:
    """(seeds, how they differ in sum(weight * answer)) of each scope that has more than one."""
    found = []
    for _, rows in answers.images.assign(row=np.arange(len(weight))).groupby("scope"):
        part = answers.correct[rows.row] * weight[rows.row, None]
        part = part[:, ~np.isnan(part).any(0)]
        if (seeds := part.shape[1]) < 2:
            continue
        of_seed = part.sum(0)
        share = weight[rows.row] / weight[rows.row].sum()
        odd = part - part.mean(1, keepdims=True) - np.outer(share, of_seed - of_seed.mean())
        within = sum(_clustered_variance(odd[:, seed], rows.patient) for seed in range(seeds)) / (seeds - 1)
        found.append((seeds, Trainings(float(of_seed.var(ddof=1)), within, seeds - 1)))
    return found


def _freedom(weight: np.ndarray, clusters) -> float:
    """Degrees of freedom of a variance between clusters that have such shares of the weight; hardly any for one cluster."""
    shares = np.bincount(pd.factorize(clusters)[0], weights=weight) / weight.sum()
    return max(0.1, float(1 / (shares**2).sum()) - 1)


def _clustered_variance(influence: np.ndarray, clusters) -> float:
    """Variance of an estimate from each image's influence on it, when those of one cluster may depend on each other; 0 for one cluster."""
    codes = pd.factorize(clusters)[0]
    sums, m = np.bincount(codes, weights=influence), codes.max() + 1
    return float(m / (m - 1) * (sums**2).sum()) if m > 1 else 0.0

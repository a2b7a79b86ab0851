"""What generated images are worth in labelled ones: how many more real images the arm without them needs for the same accuracy.

The learning curve of the second arm is the monotone least-squares fit to its accuracies (isotonic regression, each level by its number of judged
images), with straight lines between. The first arm's accuracy at n real images is looked up on it: reached at n + k, generation is worth k. Nothing is
said beyond the curve's ends: where the first arm lies above its last point, k is more than what is left of it, and is given as no number.

The interval leaves out one set after the other, each with its own data, labeller, generator and trainings, the same for both arms and all levels: the
jackknife's standard error (Efron & Tibshirani 1993, ch. 11) times Student's t. An end is open (None) where it, or the estimate without some set, lies beyond
the curve, or where the first arm's accuracy may lie beyond the curve's by the same interval of their difference. Where every estimate lies beyond, the other
end is where that interval ends on the curve: at its last level an accuracy that is a little higher by chance is no worth.

With fewer than SETS sets it is a percentile bootstrap over patients (ch. 13), and speaks of the classifiers as they were trained alone: an end is open where
more than 2.5% of the draws lie beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from vhs.metrics.intervals import LEVEL
from vhs.metrics.predictions import owners

DRAWS = 2000
SETS = 3


@dataclass(frozen=True)
class Level:
    """A point of the learning curve: how many real `images` were trained on (the mean over runs), and what was predicted then: rows with their `set`."""

    value: float
    images: float
    predictions: pd.DataFrame


@dataclass(frozen=True)
class Worth:
    """`images` more, None where that lies beyond the curve; each end of `ci95` None where it does."""

    images: float | None
    ci95: list[float | None]
    said: str


def worth_of(levels: Sequence[Level], first: str, second: str, draws: int = DRAWS, seed: int = 0) -> list[Worth]:
    """The worth of arm `first` at each level, on arm `second`'s learning curve. ValueError for fewer than two levels."""
    if len({level.images for level in levels}) < 2:
        raise ValueError("a learning curve needs at least two numbers of real images: vary more values")
    levels = sorted(levels, key=lambda level: level.images)
    numbers = np.array([level.images for level in levels])
    sets = set.intersection(*(set(level.predictions["set"]) for level in levels))
    sums, images = _by_owner(levels, (first, second), (lambda rows: rows["set"]) if len(sets) >= SETS else owners)
    once = _more(sums.sum(0), images.sum(0), numbers)
    if len(sets) >= SETS:
        tails, alone = _jackknife(once, sums, images, numbers), ""
    else:
        tails, alone = _bootstrap(sums, images, numbers, draws, np.random.default_rng(seed)), ", for the classifiers as they were trained"
    return [_said(once[n], tails[:, n], numbers[n], numbers, alone) for n in range(len(levels))]


def _jackknife(once: np.ndarray, sums: np.ndarray, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """[2, levels], the ends of each level's interval; infinite where open."""
    sets = len(images)
    without = np.array([_more(sums.sum(0) - sums[n], images.sum(0) - images[n], numbers) for n in range(sets)])
    lowest, highest = numbers[0] - numbers, numbers[-1] - numbers
    inside = np.clip(without, lowest, highest)
    half = _half(inside)
    low, high = np.clip(once, lowest, highest) - half, np.clip(once, lowest, highest) + half
    (low_first, low_last), (high_first, high_last) = _margins(sums, images)
    low = np.where(np.isneginf(without).any(0) | (low < lowest) | (low_first < 0), -np.inf, low)
    high = np.where(np.isposinf(without).any(0) | (high > highest) | (high_last > 0), np.inf, high)
    _, curve = _curve(sums.sum(0), images.sum(0))
    at_least, at_most = (np.array([_reached(one, curve, numbers) for one in ends]) - numbers for ends in (curve[-1] + low_last, curve[0] + high_first))
    return np.stack([np.where(np.isposinf(without).all(0), at_least, low), np.where(np.isneginf(without).all(0), at_most, high)])


def _margins(sums: np.ndarray, images: np.ndarray) -> np.ndarray:
    """[2, 2, levels]: lower and upper end of the first arm's accuracy at each level less the curve's at its first and at its last."""
    sets = len(images)

    def margins(sums: np.ndarray, images: np.ndarray) -> np.ndarray:
        said, curve = _curve(sums, images)
        return said[:, 0] - curve[[0, -1], None]

    without = np.array([margins(sums.sum(0) - sums[n], images.sum(0) - images[n]) for n in range(sets)])
    half = _half(without)
    return margins(sums.sum(0), images.sum(0)) + np.stack([-half, half])


def _half(without: np.ndarray) -> np.ndarray:
    """Half of the jackknife's interval of an estimate, from the estimates without each set."""
    sets = len(without)
    return stats.t.ppf((1 + LEVEL) / 2, sets - 1) * np.sqrt((sets - 1) / sets * ((without - without.mean(0)) ** 2).sum(0))


def _bootstrap(sums: np.ndarray, images: np.ndarray, numbers: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """[2, levels], as _jackknife's."""
    found, patients = [], len(images)
    for _ in range(draws):
        weight = rng.multinomial(patients, np.full(patients, 1 / patients))
        found.append(_more(np.tensordot(weight, sums, 1), weight @ images, numbers))
    tail = round(draws * (1 - LEVEL) / 2)
    return np.sort(found, axis=0)[[tail, -1 - tail]]  # not np.quantile, which cannot count what is infinite


def _by_owner(levels: Sequence[Level], arms: tuple[str, str], owner: Callable) -> tuple[np.ndarray, np.ndarray]:
    """(right answers [owners, levels, arms], judged images [owners, levels]); an image's answer is the mean over seeds. `owner` of rows: patient or set."""
    tables = []
    for number, level in enumerate(levels):
        rows = level.predictions
        by_image = rows.assign(correct=rows.predicted == rows.label, owner=owner(rows)).groupby(["arm", "owner", "key"]).correct.mean()
        first, second = (by_image[arm].groupby("owner").agg(["sum", "count"]) for arm in arms)
        tables.append(pd.DataFrame({("first", number): first["sum"], ("second", number): second["sum"], ("images", number): first["count"]}))
    whole = pd.concat(tables, axis=1).fillna(0.0)
    first, second, images = (whole[[(name, number) for number in range(len(levels))]].to_numpy(dtype=float) for name in ("first", "second", "images"))
    return np.stack([first, second], axis=-1), images


def _more(sums: np.ndarray, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Right answers [levels, arms] of so many images [levels] -> [levels], how many more real images; infinite where that lies beyond the curve."""
    said, curve = _curve(sums, images)
    return np.array([_reached(accuracy, curve, numbers) - number for accuracy, number in zip(said[:, 0], numbers)])


def _curve(sums: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(accuracies [levels, arms], the learning curve [levels])."""
    from sklearn.isotonic import isotonic_regression

    said = sums / np.maximum(images, 1)[:, None]
    return said, isotonic_regression(said[:, 1], sample_weight=np.maximum(images, 1e-9))


def _reached(accuracy: float, curve: np.ndarray, numbers: np.ndarray) -> float:
    """Where the rising `curve` over `numbers` first is at `accuracy`; where it is flat there, the middle."""
    if accuracy > curve[-1] + 1e-12:
        return math.inf
    if accuracy < curve[0] - 1e-12:
        return -math.inf
    left, right = np.searchsorted(curve, accuracy - 1e-12), np.searchsorted(curve, accuracy + 1e-12, "right")
    if right > left:  # on points of the curve
        return float(numbers[left:right].mean())
    low, high = left - 1, left
    return float(numbers[low] + (numbers[high] - numbers[low]) * (accuracy - curve[low]) / (curve[high] - curve[low]))


def _said(more: float, tails: np.ndarray, here: float, numbers: np.ndarray, alone: str) -> Worth:
    ends = [float(end) if math.isfinite(end) else None for end in tails]
    low, high = (_number(end) if math.isfinite(end) else "beyond the curve" if end > 0 else "below the curve" for end in tails)
    interval = f"[{low}, {high}]{alone}"
    if math.isfinite(more):
        return Worth(float(more), ends, f"{_number(more, '+')} labelled images {interval}")
    sure = "" if np.isinf(tails).all() and tails[0] == tails[1] else "perhaps "
    bound, place = ("more", "above the curve's end") if more > 0 else ("less", "below the curve's beginning")
    least = _number((numbers[-1] if more > 0 else numbers[0]) - here)
    return Worth(None, ends, f"{sure}{bound} than {least} labelled images, how many cannot be said: it lies {place} {interval}")


def _number(images: float, sign: str = "") -> str:
    return f"{images:{sign}.0f}".replace("-", "\N{MINUS SIGN}")

"""What generated images are worth in labelled ones: how many more real images the arm without them needs for the same accuracy.

The learning curve of the second arm is the monotone least-squares fit to its accuracies (isotonic regression, each level by its number of judged
images), with straight lines between. The first arm's accuracy at n real images is looked up on it: reached at n + k, generation is worth k. Nothing is
said beyond the curve's ends: where the first arm lies above its last point, k is more than what is left of it, and is given as no number.

The interval is a percentile bootstrap over patients (Efron & Tibshirani 1993, ch. 13), the same draw of patients for both arms and all levels, with the
classifiers as they were trained. Draws that lie beyond an end count as beyond: where more than 2.5% do, that end of the interval is open (None).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from vhs.metrics.intervals import LEVEL
from vhs.metrics.predictions import owners

DRAWS = 2000


@dataclass(frozen=True)
class Level:
    """A point of the learning curve: how many real `images` were trained on (the mean over runs), and what was predicted then."""

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
    sums, images = _by_patient(levels, (first, second))
    numbers = np.array([level.images for level in levels])
    once = _more(sums.sum(0), images.sum(0), numbers)
    rng, patients = np.random.default_rng(seed), len(images)
    found = []
    for _ in range(draws):
        weight = rng.multinomial(patients, np.full(patients, 1 / patients))
        found.append(_more(np.tensordot(weight, sums, 1), weight @ images, numbers))
    tail = round(draws * (1 - LEVEL) / 2)
    tails = np.sort(found, axis=0)[[tail, -1 - tail]]  # not np.quantile, which cannot count what is infinite
    return [_said(once[n], tails[:, n], numbers[n], numbers) for n in range(len(levels))]


def _by_patient(levels: Sequence[Level], arms: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """(right answers [patients, levels, arms], judged images [patients, levels]); an image's answer is the mean over seeds."""
    tables = []
    for number, level in enumerate(levels):
        rows = level.predictions
        by_image = rows.assign(correct=rows.predicted == rows.label, owner=owners(rows)).groupby(["arm", "owner", "key"]).correct.mean()
        first, second = (by_image[arm].groupby("owner").agg(["sum", "count"]) for arm in arms)
        tables.append(pd.DataFrame({("first", number): first["sum"], ("second", number): second["sum"], ("images", number): first["count"]}))
    whole = pd.concat(tables, axis=1).fillna(0.0)
    first, second, images = (whole[[(name, number) for number in range(len(levels))]].to_numpy(dtype=float) for name in ("first", "second", "images"))
    return np.stack([first, second], axis=-1), images


def _more(sums: np.ndarray, images: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Right answers [levels, arms] of so many images [levels] -> [levels], how many more real images; infinite where that lies beyond the curve."""
    from sklearn.isotonic import isotonic_regression

    said = sums / np.maximum(images, 1)[:, None]
    curve = isotonic_regression(said[:, 1], sample_weight=np.maximum(images, 1e-9))
    return np.array([_reached(accuracy, curve, numbers) - number for accuracy, number in zip(said[:, 0], numbers)])


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


def _said(more: float, tails: np.ndarray, here: float, numbers: np.ndarray) -> Worth:
    ends = [float(end) if math.isfinite(end) else None for end in tails]
    low, high = (beyond if end is None else _number(end) for end, beyond in zip(ends, ("below the curve", "beyond the curve")))
    interval = f"[{low}, {high}]"
    if math.isfinite(more):
        return Worth(float(more), ends, f"{_number(more, '+')} labelled images {interval}")
    if more > 0:
        return Worth(None, ends, f"more than {_number(numbers[-1] - here)} labelled images, how many cannot be said: it lies above the curve's end {interval}")
    return Worth(None, ends, f"less than {_number(numbers[0] - here)} labelled images, how many cannot be said: it lies below the curve's beginning {interval}")


def _number(images: float, sign: str = "") -> str:
    return f"{images:{sign}.0f}".replace("-", "\N{MINUS SIGN}")

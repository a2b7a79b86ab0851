"""What a measurement is worth: verdicts, and the thresholds behind them, fitted on the images a labeller learnt from.

Each measurement carries its doubts: implausible geometry, the width of the heat maps, the distance of the image's features from those of the
training images, the index's spread, and the nearest training image. `verdict` turns them into accepted or a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vhs.duplicates import distances
from vhs.measure import View

ENOUGH = 10  # images behind a threshold


@dataclass(frozen=True)
class Measurement:
    """What a labeller saw in N images of side `side_px`.

    points float32 [N, K, 2] in the images' own pixels; index float64 [N] (not finite where the points are degenerate); spread float64 [N],
    the index's standard deviation (see Labeller.measure); peak float64 [N], the widest heat map's standard deviation in network pixels;
    features float32 [N, C], the bottleneck's mean; hashes, the perceptual hash of each image (vhs/duplicates.py).
    """

    side_px: int
    points: np.ndarray
    index: np.ndarray
    spread: np.ndarray
    peak: np.ndarray
    features: np.ndarray
    hashes: tuple[str, ...] = ()


NEARER = 0.8  # on 80 clinic dogs copies (noise, blur, brightness, a pixel's shift) lie below 0.23, strangers above 0.59, whose least among 40 was 0.62


@dataclass(frozen=True)
class Copies:
    """The training images as they are recognised: key, hash and features [N, C] of each, and `limit`, the distance below which an image is a copy.

    The distance of two images is the mean of what their hashes and their features differ by, each as a share of `typical`, the median between two
    training patients; so it is 1 between strangers and near 0 between copies.
    """

    keys: tuple[str, ...]
    hashes: tuple[str, ...]
    features: np.ndarray
    typical: tuple[float, float]  # bits, feature units
    limit: float

    @classmethod
    def fit(cls, measurement: Measurement, keys: list[str], patients: list[str]) -> Copies | None:
        """The limit is NEARER of the least distance between images of two training patients: a copy is nearer than two patients ever are, and among
        thousands of strangers some are a little nearer than any two of a few dozen. None for one patient."""
        who = np.asarray(patients)
        strangers = who[:, None] != who[None]
        if not strangers.any():
            return None
        seen = measurement.hashes, measurement.features
        bits, apart = _apart(*seen, *seen, measurement.features.std(0))
        typical = tuple(max(float(np.median(part[strangers])), 1e-6) for part in (bits, apart))
        whole = cls(tuple(keys), measurement.hashes, measurement.features.astype(np.float32), typical, 0.0)
        return cls(whole.keys, whole.hashes, whole.features, typical, NEARER * float(whole.distances(*seen)[strangers].min()))

    def distances(self, hashes: Sequence[str], features: np.ndarray, others: tuple[Sequence[str], np.ndarray] | None = None) -> np.ndarray:
        """float32 [M, N] between M images and the N training images, or `others`, measured by what training patients differ by all the same: the bits
        beyond are other ones with every kind of CPU."""
        bits, apart = _apart(hashes, features, *(others or (self.hashes, self.features)), self.features.std(0))
        return ((bits / self.typical[0] + apart / self.typical[1]) / 2).astype(np.float32)

    def nearest(self, measurement: Measurement) -> tuple[list[str], np.ndarray]:
        """Key of the nearest training image and the distance to it, of every image measured."""
        away = self.distances(measurement.hashes, measurement.features)
        return [self.keys[n] for n in away.argmin(1)], away.min(1)

    def copied(self, measurement: Measurement) -> np.ndarray:
        """bool [M]: nearer to a training image than the limit."""
        return self.nearest(measurement)[1] < self.limit


def _apart(hashes, features, other_hashes, other_features, deviation) -> tuple[np.ndarray, np.ndarray]:
    """Bits and root mean square feature difference (in units of `deviation`, [C]) between every two: [M, N] each."""
    bits = distances(hashes, other_hashes).astype(np.float64)
    scale = deviation + 1e-6
    a, b = (np.asarray(part, np.float64) / scale for part in (features, other_features))
    square = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return bits, np.sqrt(square.clip(min=0) / a.shape[1])


@dataclass(frozen=True)
class Thresholds:
    """The largest doubt accepted of each kind, and the training images' features: mean [C] and inverse covariance [C, C]."""

    quantile: float
    spread: float
    peak: float
    distance: float
    mean: np.ndarray
    precision: np.ndarray


def plausible(measurement: Measurement, view: View) -> np.ndarray:
    """bool [N]: points inside the image, axes of some length, index and ratio of axes within the view's generous ranges."""
    points = measurement.points.astype(np.float64)
    inside = ((points >= -0.5) & (points <= measurement.side_px - 0.5)).all((1, 2))
    lengths = np.stack([np.linalg.norm(points[:, i] - points[:, j], axis=-1) for i, j in view.axes], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = lengths[:, 0] / lengths[:, 1]
        low, high = view.axes_ratio
        shaped = (low <= ratio) & (ratio <= high) & (lengths > 0.05 * measurement.side_px).all(1)
        return inside & shaped & (view.plausible[0] <= measurement.index) & (measurement.index <= view.plausible[1])


def _distance(features: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of each row (Lee et al. 2018, arXiv:1807.03888)."""
    away = features.astype(np.float64) - mean
    return np.sqrt(np.einsum("nc,cd,nd->n", away, precision.astype(np.float64), away).clip(min=0))


def fit_thresholds(measurement: Measurement, quantile: float, slack: float = 1.0, unseen: np.ndarray | None = None) -> Thresholds:
    """Thresholds at the `quantile` of the images' own values, times `slack`.

    `unseen` bool [N]: images the network did not learn from (the inner validation). Where there are ENOUGH of them they alone give the spread's
    and the heat maps' threshold, for a network is surer of what it has learnt. The features' distance is taken over all images, each to a
    covariance (shrunk: Ledoit & Wolf 2004) fitted without its fifth of them, for an image lies closer to a cloud it helped to place than a new
    one does. ValueError under ENOUGH images.
    """
    from sklearn.covariance import LedoitWolf  # two seconds, which a process that only measures need not wait

    count = len(measurement.index)
    if count < ENOUGH:
        raise ValueError(f"verdict thresholds need at least {ENOUGH} training images, got {count}")
    features = measurement.features.astype(np.float64)
    fold = np.arange(count) % 5
    distance = np.empty(count)
    for k in range(5):
        others = LedoitWolf().fit(features[fold != k])
        distance[fold == k] = _distance(features[fold == k], others.location_, others.precision_)
    whole = LedoitWolf().fit(features)
    fresh = unseen if unseen is not None and unseen.sum() >= ENOUGH else np.ones(count, bool)
    limits = [slack * float(np.quantile(values, quantile)) for values in (measurement.spread[fresh], measurement.peak[fresh], distance)]
    limits = [float(f"{limit:.9g}") for limit in limits]  # the last bits of a covariance are other ones with every kind of CPU that BLAS knows
    return Thresholds(quantile, *limits, whole.location_.astype(np.float32), whole.precision_.astype(np.float32))


def verdict(measurement: Measurement, thresholds: Thresholds, view: View, copied: np.ndarray) -> list[tuple[bool, str]]:
    """(accepted, reason) for each image: the first that holds of "implausible geometry", "out of distribution", "spread", "near-copy", else "".

    `copied` bool [N]: images that Copies recognises.
    """
    strange = measurement.peak > thresholds.peak
    strange |= _distance(measurement.features, thresholds.mean, thresholds.precision) > thresholds.distance
    unsure = ~(measurement.spread <= thresholds.spread)  # a spread that is no number is no small one
    checks = {"implausible geometry": ~plausible(measurement, view), "out of distribution": strange, "spread": unsure, "near-copy": copied}
    reasons = [next((reason for reason, failed in checks.items() if failed[n]), "") for n in range(len(measurement.index))]
    return [(not reason, reason) for reason in reasons]

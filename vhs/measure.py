"""Key points -> heart-size index -> class. The only place that holds thresholds and knows what a mirror does to points.

The views that come with vhs measure the same thing, a heart against the skeleton that carries it:

    canine_lateral  VHS = 6 (|AB| + |CD|) / |EF|      Buchanan & Bücheler, JAVMA 206:194 (1995), over six points as DogHeart stores them
    human_frontal   CTR = heart width / thorax width  Danzer, Am J Med Sci 157:513 (1919), horizontal extents of four points

Another measure is another entry of VIEWS (tests/test_third_measure.py adds the Norberg angle of the hip). Lengths are taken in isotropic
pixels: letterbox an image, never squash it. Everything here takes NumPy arrays and torch tensors alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

CLASSES = ("small", "normal", "large")  # class index = position here, in every file this project writes
UNKNOWN = -1  # in the place of a class index: a test image that came without a label


def _distance(points, i: int, j: int):
    return ((points[..., i, :] - points[..., j, :]) ** 2).sum(-1) ** 0.5


def _vhs(points):
    return 6 * (_distance(points, 0, 1) + _distance(points, 2, 3)) / _distance(points, 4, 5)


def _ctr(points):
    x = points[..., 0]
    return abs(x[..., 1] - x[..., 0]) / abs(x[..., 3] - x[..., 2])


@dataclass(frozen=True)
class View:
    """One projection and its index.

    `formula`: points [..., K, 2] -> index [...], for NumPy arrays and, with gradients, for torch tensors.
    `edges` (low, high): small < low <= normal <= high < large; with `high_is_large`, an index equal to `high` is large. The classes are
    positions on the index, whatever its name: where a low index is the illness, "large" is the healthy end.
    `mirror`: the order the points take when the image is flipped left to right (anatomical names keep their order, left and right swap).
    `axes`: the pairs of points drawn as lines. `bin_width`: width of the index bins that tables use.
    `plausible`, `axes_ratio`: generous ranges of the index and of first axis / second axis; beyond them it is the points that are wrong.
    `tilt_deg`: how far a labeller's training may turn an image, without leaving what the index is defined on.
    """

    name: str
    index: str
    formula: Callable
    subject: str
    points: tuple[str, ...]
    axes: tuple[tuple[int, int], ...]
    mirror: tuple[int, ...]
    edges: tuple[float, float]
    bin_width: float
    plausible: tuple[float, float]
    axes_ratio: tuple[float, float]
    tilt_deg: float = 10.0
    high_is_large: bool = False

    def measure(self, points):
        """Index of `points` [..., K, 2] (x right, y down, isotropic pixels) -> [...]."""
        if points.shape[-2:] != (len(self.points), 2):
            raise ValueError(f"{self.name} measures {len(self.points)} points ({', '.join(self.points)}), got shape {tuple(points.shape)}")
        return self.formula(points)

    def classify(self, index):
        """Class number (position in CLASSES) of each index, an integer array of the same shape. NaN has no class: ValueError."""
        import numpy as np

        index = np.asarray(index, dtype=np.float64)
        if np.isnan(index).any():
            raise ValueError(f"{self.index} is not a number for {int(np.isnan(index).sum())} of {index.size} images: reject them first")
        low, high = self.edges
        above = index >= high if self.high_is_large else index > high
        return np.where(index < low, 0, np.where(above, 2, 1)).astype(np.int64)

    def with_edges(self, edges: tuple[float, float] | None, high_is_large: bool | None = None) -> View:
        """The same view cut elsewhere (None keeps what is published)."""
        low, high = edges or self.edges
        if not low < high:
            raise ValueError(f"class edges must rise, got {low} and {high}; {self.index} uses {self.edges[0]} and {self.edges[1]}")
        return replace(self, edges=(low, high), high_is_large=self.high_is_large if high_is_large is None else high_is_large)


VIEWS = {
    "canine_lateral": View(
        name="canine_lateral", index="VHS", formula=_vhs, subject="dog", points=("A", "B", "C", "D", "E", "F"), axes=((0, 1), (2, 3), (4, 5)),
        mirror=(0, 1, 2, 3, 4, 5), edges=(8.2, 10.0), bin_width=0.5, plausible=(4.0, 16.0), axes_ratio=(0.7, 3.0),
    ),
    "human_frontal": View(
        name="human_frontal", index="CTR", formula=_ctr, subject="human", axes=((0, 1), (2, 3)), mirror=(1, 0, 3, 2),
        points=("heart_left", "heart_right", "thorax_left", "thorax_right"), edges=(0.42, 0.50), bin_width=0.02, plausible=(0.2, 0.9),
        axes_ratio=(0.2, 1.0), tilt_deg=3.0,  # horizontal extents, taken at the left-most edge, turn into others
    ),
}

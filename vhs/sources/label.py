"""One label from all that is said of an image: key points, a stated index, a file name, a folder.

They have to agree. Which of two is right only a person can say, so an image with a contradiction is not used, and its reason names
both values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from vhs.measure import CLASSES, UNKNOWN, VIEWS, View


class Unusable(ValueError):
    """This image has no label we can use; the message is the reason."""


@dataclass(frozen=True)
class _Claim:
    """An index of one image and who says so, good to within `tolerance`."""

    who: str
    index: float
    tolerance: float


def settle(source: dict, points, view: View, shape: tuple[int, int]) -> tuple[int, float]:
    """-> (label, index). The index is measured where there are `points` ([K, 2] in pixels of the image of `shape` H, W), else as stated;
    NaN where only the class is known. The label is the class of the index where there is one, else as stated, else UNKNOWN.

    `source`: `label`, `index`, `name_index` as Source has them, each of which may be lacking. Raises Unusable.
    """
    claims = _claims(source, points, view, shape)
    stated = source.get("label")
    if claims:
        best, *others = claims
        for other in others:
            if abs(other.index - best.index) > other.tolerance and not (points is not None and _squashed(points, view, shape, other)):
                raise Unusable(f"contradiction: {view.index} {best.index:.4g} by {best.who}, {other.index:.4g} by {other.who}")
        if stated is not None and stated not in _classes(best, view):
            by_index = CLASSES[int(view.classify(best.index))]
            raise Unusable(f"contradiction: {by_index} ({view.index} {best.index:.4g}) by {best.who}, {stated} by its folder or table")
        if points is not None or source.get("index") is not None:
            return int(view.classify(best.index)), best.index
    return UNKNOWN if stated is None else CLASSES.index(stated), float("nan")


def foreseen(source: dict, view: View) -> int:
    """The label that `settle` gives unless it raises, told before the image is seen."""
    index = source.get("index") if source.get("points") is None else float(view.measure(np.asarray(source["points"], np.float64)))
    if index is not None:
        return int(view.classify(index)) if math.isfinite(index) else UNKNOWN
    return UNKNOWN if source.get("label") is None else CLASSES.index(source["label"])


def _claims(source: dict, points, view: View, shape: tuple[int, int]) -> list[_Claim]:
    """Who says what of the index, the most trustworthy first."""
    allowed = view.bin_width / 10
    claims = [] if points is None else [_Claim("its key points", _measured(points, view, shape), allowed)]
    if (index := source.get("index")) is not None:
        if not math.isfinite(index):
            raise Unusable(f"{view.index} is not a number")
        claims.append(_Claim("its label", index, allowed))
    if (index := source.get("name_index")) is not None:
        claims.append(_Claim("its file name", index, allowed + 0.05))  # names carry one decimal
    if claims and not view.plausible[0] <= claims[0].index <= view.plausible[1]:
        raise Unusable(
            f"{view.index} {claims[0].index:.4g} by {claims[0].who} is implausible: {view.plausible[0]:g} to {view.plausible[1]:g} are"
        )
    return claims


def _measured(points, view: View, shape: tuple[int, int]) -> float:
    points, (height, width) = np.asarray(points, np.float64), shape
    if (points < -0.5).any() or (points > (width - 0.5, height - 0.5)).any():
        raise Unusable(f"key points outside the image of {width} x {height} pixels")
    with np.errstate(divide="ignore", invalid="ignore"):
        index = float(view.measure(points))
    if not math.isfinite(index):
        raise Unusable(f"{view.index} cannot be measured: two key points coincide")
    return index


def _classes(claim: _Claim, view: View) -> set[str]:
    """The classes an index may have been given: beside an edge both, and with edges of this run's own also the published cut's."""
    near = [claim.index - claim.tolerance, claim.index, claim.index + claim.tolerance]
    return {CLASSES[number] for cut in (view, VIEWS[view.name]) for number in cut.classify(near)}


def _squashed(points, view: View, shape: tuple[int, int], claim: _Claim) -> bool:
    """Whether the claim is what measuring after a resize to a square gives, as the VHSMarker tool does: then the points are right."""
    height, width = shape
    return abs(float(view.measure(np.asarray(points, np.float64) / (width, height))) - claim.index) <= claim.tolerance

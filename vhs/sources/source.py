"""What every reader makes: one image, or one label that lacks its image, with what came along."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vhs.measure import CLASSES, View

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
UNREAD = (".bmp", ".gif", ".webp", ".jp2", ".jpx", ".heic", ".avif", ".svg", ".nii", ".mha", ".nrrd")  # images too, of formats that are not read
SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "test": "test",
    "test_images": "test",
}
NO_LABEL = "image without a label: neither a class, nor an index, nor key points"
ORPHAN = "label without an image"
FORMAT = f"an image of a format that is not read: export it as one of {' '.join(SUFFIXES)}"


class SourceError(Exception):
    """A data folder that cannot be used as it is; the message says what was looked for and found."""


@dataclass(frozen=True)
class Source:
    """One image to ingest: where it is and what came with it.

    `label`: a class name. `points`: K pairs in original pixels. `index`: the VHS or CTR that its label states; `name_index`: the one that
    its file name carries, which never labels an image but may contradict its label. `reject`: why it cannot be used.
    """

    file: str
    patient: str | None = None
    source: str | None = None
    label: str | None = None
    points: tuple[tuple[float, float], ...] | None = None
    split: str | None = None
    index: float | None = None
    name_index: float | None = None
    reject: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def class_of(word: str) -> str | None:
    """The class a folder or a cell names, in any case."""
    return word.strip().lower() if word.strip().lower() in CLASSES else None


def faulty_points(points: Sequence[tuple[float, float]], view: View) -> str | None:
    """The reason why `points` cannot be the view's key points, or None. Where they lie is judged when the image is there."""
    if len(points) != len(view.points):
        return f"holds {len(points)} key points, {view.name} measures {len(view.points)} ({', '.join(view.points)})"
    bad = [name for name, pair in zip(view.points, points, strict=True) if not all(map(math.isfinite, pair))]
    return f"key point {', '.join(bad)} is not a number" if bad else None

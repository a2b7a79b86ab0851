"""What every reader reads, a place, and what it makes: one image, or one label that lacks its image, with what came along."""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import BinaryIO, Protocol
from urllib.parse import unquote

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


OUTSIDE = "names a file outside of the data's folder, where nothing is looked for: put its images below the table"
FOLLOWED = "names a URL, and none is followed: bring the file"
LABEL_BYTES = 1 << 20  # of the label of one image; the field's have a few hundred


class SourceError(Exception):
    """A data folder that cannot be used as it is; the message says what was looked for and found."""


class Place(Protocol):
    """Where the files lie, under relative names ("Train/Small/1.png"): a folder, or a prefix in a bucket. A shards.storage.Storage is one."""

    url: str

    def list(self, prefix: str = "") -> list[str]: ...
    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes: ...
    def stream(self, path: str) -> BinaryIO: ...


def typed(place: Place, name: str = "") -> str:
    """The place, or a file in it, as a person types it."""
    root = unquote(place.url.removeprefix("file://"))
    return f"{root}/{name}" if name else root


def inside(name: str, place: Place | None = None) -> tuple[str, str | None]:
    """-> (a name that data gives, in short; why it may not be opened, or None). `place`: below it a name may be absolute too."""
    if url := re.match(r"\w+://(?:[^/]*@)?([^?#]*)", name):
        return url[1], FOLLOWED  # without what may be a key
    short = posixpath.normpath(name)
    if place is not None and short.startswith(typed(place) + "/"):
        short = short[len(typed(place)) + 1 :]
    return (name, OUTSIDE) if short.startswith("/") or ".." in short.split("/") or "\0" in short else (short, None)


@dataclass(frozen=True)
class Source:
    """One image to ingest: where it is and what came with it.

    `file`: its name in the place; of a sample in a shard TAR/NAME, and `inside` (tar, offset, size) of its bytes. `sha256` of them, where a
    reader has read them anyway. `label`: a class name. `points`: K pairs in original pixels. `index`: the VHS or CTR that its label states;
    `name_index`: the one that its file name carries, which never labels an image but may contradict its label. `reject`: why it cannot be used.
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
    inside: tuple[str, int, int] | None = None
    sha256: str | None = None

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

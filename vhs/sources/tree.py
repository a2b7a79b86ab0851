"""Folders that say what an image is: class folders, key-point trees, and both in one.

    [Train/ Valid/ Test/] Small/ Normal/ Large/ *.png             in any case, however deep they were zipped
    [Train/ Valid/ Test/] Images/*.png  Labels/*.mat              paired by stem
    [Train/ Valid/ Test/] Images/  Labels/  Images_classes/<class>/   the images of Images_classes are those of Images, sorted by class

An image of a test split needs no label. Everywhere else an image without a label, and a label without an image, is listed as such.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from vhs.measure import View
from vhs.sources import annotation
from vhs.sources.source import FORMAT, NO_LABEL, ORPHAN, SPLITS, SUFFIXES, UNREAD, Source, class_of

ROLES = ("images", "labels", "images_classes")
_NAME_WITH_INDEX = re.compile(r"\d+_(\d{1,2}\.\d+)_\d+")  # DogHeart: number _ VHS _ code
Pair = tuple[Path, str]  # what an image and its label have in common: the folder above Images and Labels, and the stem


@dataclass(frozen=True)
class Listing:
    """Every image and label file by what it is paired by: `plain` images, `classed` ones (below a class folder), `labels`; `unread` images."""

    data: Path
    plain: dict[Pair, list[Path]]
    classed: dict[Pair, list[Path]]
    labels: dict[Pair, list[Path]]
    unread: list[Path]

    @property
    def labelled(self) -> bool:
        return bool(self.classed or self.labels)

    @property
    def words(self) -> str:
        if self.labels:
            return f"a key-point tree (Images beside Labels{', sorted by class too' if self.classed else ''})"
        return "class folders"


def survey(data: Path) -> Listing:
    """What lies below `data`, by name only. Leaves out hidden files and what macOS adds to a zip, which are no one's data."""
    listing = Listing(data, defaultdict(list), defaultdict(list), defaultdict(list), [])
    for file in sorted(data.rglob("*")):
        parts = file.relative_to(data).parts
        suffix = file.suffix.lower()
        if suffix not in (*SUFFIXES, *UNREAD, *annotation.SUFFIXES) or "__MACOSX" in parts or any(part.startswith(".") for part in parts):
            continue
        kept = [part for part in parts[:-1] if part.lower() not in ROLES and not class_of(part)]
        pair = (data.joinpath(*kept), file.stem)
        if suffix in UNREAD:
            listing.unread.append(file)
        elif suffix in annotation.SUFFIXES:
            if "labels" in map(str.lower, parts[:-1]):  # elsewhere a .json may be anything
                listing.labels[pair].append(file)
        else:
            (listing.classed if any(map(class_of, parts[:-1])) else listing.plain)[pair].append(file)
    return listing


def read(listing: Listing, view: View) -> list[Source]:
    """One source for each image, one reject for each label without an image and for each image that cannot be read."""
    found = [Source(str(file), split=_split(listing, file), reject=FORMAT) for file in listing.unread]
    for pair in sorted({*listing.plain, *listing.classed, *listing.labels}):
        plain, classed, labels = (group.get(pair, []) for group in (listing.plain, listing.classed, listing.labels))
        copied = any(file.parent.name.lower() == "images" for file in plain)  # what lies in class folders too is the same image, sorted
        images = plain if copied else plain + classed
        classes = sorted({_class(listing, file) for file in classed}) if copied else []
        said = annotation.read(labels[0], view) if labels and images else {}
        if len(labels) > 1 or (labels and len(images) > 1):
            said = {"reject": f"image and label are no pair: {', '.join(_short(listing, file) for file in images + labels)}"}
        if len(classes) > 1:
            said = {"reject": f"lies in the class folders {' and '.join(classes)}"}
        found += [_source(listing, file, view, said, *classes[:1]) for file in images]
        if not images:
            found += [Source(str(file), split=_split(listing, file), reject=ORPHAN) for file in labels]
    return found


def _source(listing: Listing, file: Path, view: View, said: dict, sorted_as: str | None = None) -> Source:
    label, split = sorted_as or _class(listing, file), _split(listing, file)
    named = _NAME_WITH_INDEX.fullmatch(file.stem) if view.index == "VHS" else None
    known = label or said.get("points") or said.get("index") is not None
    return Source(
        str(file),
        label=label,
        points=said.get("points"),
        split=split,
        index=said.get("index"),
        name_index=float(named[1]) if named else None,
        reject=said.get("reject") or (None if known or split == "test" else NO_LABEL),
    )


def _parents(listing: Listing, file: Path) -> tuple[str, ...]:
    return file.relative_to(listing.data).parts[:-1]


def _class(listing: Listing, file: Path) -> str | None:
    return next((class_of(part) for part in reversed(_parents(listing, file)) if class_of(part)), None)


def _split(listing: Listing, file: Path) -> str | None:
    return next((SPLITS[part.lower()] for part in _parents(listing, file) if part.lower() in SPLITS), None)


def _short(listing: Listing, file: Path) -> str:
    return file.relative_to(listing.data).as_posix()

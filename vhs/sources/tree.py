"""Folders that say what an image is: class folders, key-point trees, and both in one.

    [Train/ Valid/ Test/] Small/ Normal/ Large/ *.png             in any case, however deep they were zipped
    [Train/ Valid/ Test/] 0/ 1/ 2/ *.png                          the same, where nothing else tells a class; their order has to be told
    [Train/ Valid/ Test/] Images/*.png  Labels/*.mat              paired by stem
    [Train/ Valid/ Test/] Images/  Labels/  Images_classes/<class>/   the images of Images_classes are those of Images, sorted by class

An image of a test split needs no label. Everywhere else an image without a label, and a label without an image, is listed as such.
"""

from __future__ import annotations

import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from vhs.contained import Contained
from vhs.measure import View
from vhs.sources import annotation
from vhs.sources.source import FORMAT, LABEL_BYTES, NO_LABEL, ORPHAN, SPLITS, SUFFIXES, UNREAD, Place, Source, class_of, typed
from vhs.sources.table import NUMBERS, class_numbers

ROLES = ("images", "labels", "images_classes")
_NAME_WITH_INDEX = re.compile(r"\d+_(\d{1,2}\.\d+)_\d+")  # DogHeart: number _ VHS _ code
AT_ONCE = 16  # label files that are asked for at a time
Pair = tuple[str, str]  # what an image and its label have in common: the folder above Images and Labels, and the stem


@dataclass(frozen=True)
class Listing:
    """Every image and label file by what it is paired by: `plain` images, `classed` ones (below a class folder), `labels`; `unread` images. `numbers`: what
    the class folders are called where they are numbered."""

    place: Place
    plain: dict[Pair, list[PurePosixPath]]
    classed: dict[Pair, list[PurePosixPath]]
    labels: dict[Pair, list[PurePosixPath]]
    unread: list[PurePosixPath]
    numbers: frozenset[str] = frozenset()

    @property
    def labelled(self) -> bool:
        return bool(self.classed or self.labels)

    @property
    def words(self) -> str:
        if self.labels:
            return f"a key-point tree (Images beside Labels{', sorted by class too' if self.classed else ''})"
        return f"class folders that are numbered {', '.join(sorted(self.numbers))}" if self.numbers else "class folders"


def survey(place: Place, names: list[str]) -> Listing:
    """What is among `names`, by name only. Leaves out hidden files and what macOS adds to a zip, which are no one's data."""
    listing = Listing(place, defaultdict(list), defaultdict(list), defaultdict(list), [])
    for file in sorted(map(PurePosixPath, names)):
        parts, suffix = file.parts, file.suffix.lower()
        if suffix not in (*SUFFIXES, *UNREAD, *annotation.SUFFIXES) or "__MACOSX" in parts or any(part.startswith(".") for part in parts):
            continue
        kept = [part for part in parts[:-1] if part.lower() not in ROLES and not class_of(part)]
        pair = ("/".join(kept), file.stem)
        if suffix in UNREAD:
            listing.unread.append(file)
        elif suffix in annotation.SUFFIXES:
            if "labels" in map(str.lower, parts[:-1]):  # elsewhere a .json may be anything
                listing.labels[pair].append(file)
        else:
            (listing.classed if any(map(class_of, parts[:-1])) else listing.plain)[pair].append(file)
    return listing if listing.labelled else _numbered(listing)


def _numbered(listing: Listing) -> Listing:
    """`listing`, whose images no folder names a class of: with those below 0, 1 and 2 as classed, if all that are not of a test split lie there."""
    numbers = frozenset(file.parent.name for files in listing.plain.values() for file in files if _split(file) != "test" or file.parent.name in NUMBERS)
    if len(numbers) < 2 or not numbers <= NUMBERS:
        return listing
    for pair, files in list(listing.plain.items()):
        if files[0].parent.name in NUMBERS:  # what has a pair in common has the folder too
            listing.classed[pair] = listing.plain.pop(pair)
    return replace(listing, numbers=numbers)


def read(listing: Listing, view: View, class_order: tuple[str, ...] | None = None) -> list[Source]:
    """One source for each image, one reject for each label without an image and for each image that cannot be read. SourceError for numbered class folders
    without a `class_order`."""
    order = class_numbers(set(listing.numbers), class_order, f"{typed(listing.place)}, by its folders,")
    found = [Source(str(file), split=_split(file), reject=FORMAT) for file in listing.unread]
    of_images = [labels[0] for pair, labels in listing.labels.items() if pair in listing.plain or pair in listing.classed]
    said_by = _labels(listing.place, of_images, view)
    for pair in sorted({*listing.plain, *listing.classed, *listing.labels}):
        plain, classed, labels = (group.get(pair, []) for group in (listing.plain, listing.classed, listing.labels))
        copied = any(file.parent.name.lower() == "images" for file in plain)  # what lies in class folders too is the same image, sorted
        images = plain if copied else plain + classed
        classes = sorted({_class(file, order) for file in classed}) if copied else []
        said = said_by[labels[0]] if labels and images else {}
        if len(labels) > 1 or (labels and len(images) > 1):
            said = {"reject": f"image and label are no pair: {', '.join(map(str, images + labels))}"}
        if len(classes) > 1:
            said = {"reject": f"lies in the class folders {' and '.join(classes)}"}
        found += [_source(file, view, said, classes[0] if classes else _class(file, order)) for file in images]
        if not images:
            found += [Source(str(file), split=_split(file), reject=ORPHAN) for file in labels]
    return found


def _labels(place: Place, files: list[PurePosixPath], view: View) -> dict[PurePosixPath, dict]:
    """What each label file says."""
    with ThreadPoolExecutor(AT_ONCE) as pool, Contained() as contained:
        read = pool.map(lambda file: place.read(str(file), 0, LABEL_BYTES + 1), files)
        return {file: annotation.read(data, file.name, view, contained) for file, data in zip(files, read, strict=True)}


def _source(file: PurePosixPath, view: View, said: dict, label: str | None) -> Source:
    split = _split(file)
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


def _class(file: PurePosixPath, order: tuple[str, ...] | None) -> str | None:
    if order and file.parent.name in NUMBERS:
        return order[int(file.parent.name)]
    return next((class_of(part) for part in reversed(file.parts[:-1]) if class_of(part)), None)


def _split(file: PurePosixPath) -> str | None:
    return next((SPLITS[part.lower()] for part in file.parts[:-1] if part.lower() in SPLITS), None)

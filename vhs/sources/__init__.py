"""What a user brings -> a list of images with what is known of each. `scan` is the door; each layout has its own reader.

    table.py        a CSV beside its images: ours with columns, the field's `name,number` with or without a header
    tree.py         folders that say it: class folders, key-point trees with a label file an image, both combined
    annotation.py   one label file of a key-point tree (.mat, .json)
    tars.py         WebDataset shards that others wrote: an image with its .json, .cls or .txt
    source.py       where files lie, and what every reader makes

Everything found is listed: what cannot be used carries the reason (`Source.reject`), and ingest publishes it.
"""

from __future__ import annotations

from dataclasses import replace

from vhs.measure import CLASSES, View
from vhs.sources import table, tars, tree
from vhs.sources.source import NO_LABEL, SUFFIXES, Place, Source, SourceError, typed

__all__ = ["SUFFIXES", "Place", "Source", "SourceError", "layout", "scan", "typed"]


def layout(place: Place, named: str | None = None) -> str:
    """What kind of data the place holds, in a few words. SourceError when it is none that is known."""
    found = _open(place, place.list(), named)
    return table.describe(found) if isinstance(found, table.Rows) else found.words


def scan(place: Place, view: View, class_order: tuple[str, ...] | None = None, named: str | None = None, labelled: bool = True) -> list[Source]:
    """Every image and every label in the place, sorted by file. SourceError when nothing fits.

    `class_order`: the classes that the numbers 0, 1, 2 stand for, where a table, folders or shards use numbers; they are never guessed.
    `named`: what of the place was asked for, a CSV, a list of shards, or a pattern of their names ("{000..012}.tar"); None: all of it.
    `labelled`: an image without a label is of no use, as everywhere but in a set that will be measured.
    """
    names = place.list()
    found = _open(place, names, named, labelled)
    if isinstance(found, table.Rows):
        sources = table.read(found, view, class_order, place, names, rest=named is None)
    elif isinstance(found, tars.Shards):
        sources = tars.read(found, view, class_order)
    else:
        sources = tree.read(found, view, class_order)
    if not labelled:
        sources = [replace(source, reject=None) if source.reject == NO_LABEL else source for source in sources]
    if all(source.reject for source in sources):
        why = f": none of {len(sources)} can be used, {sources[0].file} first: {sources[0].reject}" if sources else ", it is empty"
        raise SourceError(f"{typed(place, named or '')}: no image found{' with a label' if labelled else ''}{why}")
    return sorted(sources, key=lambda source: source.file)


def _open(place: Place, names: list[str], named: str | None, labelled: bool = True) -> table.Rows | tree.Listing | tars.Shards:
    """The CSV, the shards or the tree of folders that the place holds; its type decides who reads it."""
    if named:
        return tars.listed(place, names, named) if named.endswith(tars.SUFFIXES) else table.load(place, named)
    tables, listing = sorted(name for name in names if "/" not in name and name.endswith(".csv")), tree.survey(place, names)
    shards = tars.survey(place, names)
    if len(tables) > 1:
        raise SourceError(f"{typed(place)} holds {len(tables)} CSV files ({', '.join(tables)}): name the one with the labels")
    if shards.tars and (tables or listing.labelled):
        what = f"{typed(place)} holds both {shards.words} and {tables[0] if tables else listing.words}"
        raise SourceError(f"{what}: move one of the two elsewhere, or name the CSV or the shards, data={typed(place, '{000..099}.tar')}")
    if shards.tars:
        return shards
    if tables:
        rows = table.load(place, tables[0])
        if listing.labelled and not (rows.header and "file" in rows.columns):  # a list of predictions is often left lying about
            what = f"{typed(place)} holds both {tables[0]} and {listing.words}"
            raise SourceError(f"{what}: move the CSV out of the folder to use the folders, or say data={typed(place, tables[0])} to use the CSV")
        return rows
    if not listing.labelled and (labelled or not listing.plain):
        raise SourceError(
            f"{typed(place)}: no image found with a label, {len(listing.plain)} without. Looked for a CSV with a `file` column, for folders named "
            f"{', '.join(CLASSES)} (or 0, 1, 2), for Images/ beside Labels/*.mat, and for shards (*.tar); images are {' '.join(SUFFIXES)}"
        )
    return listing

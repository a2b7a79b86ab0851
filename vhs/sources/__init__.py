"""What a user brings -> a list of images with what is known of each. `scan` is the door; each layout has its own reader.

    table.py        a CSV beside its images: ours with columns, the field's `name,number` with or without a header
    tree.py         folders that say it: class folders, key-point trees with a label file an image, both combined
    annotation.py   one label file of a key-point tree (.mat, .json)
    source.py       what every reader makes

Everything found is listed: what cannot be used carries the reason (`Source.reject`), and ingest publishes it.
"""

from __future__ import annotations

from pathlib import Path

from vhs.measure import CLASSES, View
from vhs.sources import table, tree
from vhs.sources.source import SUFFIXES, Source, SourceError

__all__ = ["SUFFIXES", "Source", "SourceError", "layout", "scan"]


def layout(data: str | Path) -> str:
    """What kind of data `data` is, in a few words. SourceError when it is none that is known."""
    found = _open(Path(data).expanduser())
    return table.describe(found) if isinstance(found, table.Rows) else found.words


def scan(data: str | Path, view: View, class_order: tuple[str, ...] | None = None) -> list[Source]:
    """Every image and every label that `data` (a CSV, or a folder) holds, sorted by file. SourceError when nothing fits.

    `class_order`: the classes that the numbers 0, 1, 2 of a table stand for, where it uses numbers; they are never guessed.
    """
    data = Path(data).expanduser()
    found = _open(data)
    if isinstance(found, table.Rows):
        sources = table.read(found, view, class_order, data if data.is_dir() else None)
    else:
        sources = tree.read(found, view)
    if all(source.reject for source in sources):
        why = f": none of {len(sources)} can be used, {sources[0].file} first: {sources[0].reject}" if sources else ", the table is empty"
        raise SourceError(f"{data}: no image found with a label{why}")
    return sorted(sources, key=lambda source: source.file)


def _open(data: Path) -> table.Rows | tree.Listing:
    """The CSV or the tree of folders that `data` is; its type decides who reads it."""
    if not data.exists():
        raise SourceError(f"data = {str(data)!r} does not exist: give a folder, a CSV, or the word phantoms")
    if data.is_file():
        return table.load(data)
    tables, listing = sorted(data.glob("*.csv")), tree.survey(data)
    if len(tables) > 1:
        raise SourceError(f"{data} holds {len(tables)} CSV files ({', '.join(t.name for t in tables)}): name the one with the labels")
    if tables:
        rows = table.load(tables[0])
        if listing.labelled and not (rows.header and "file" in rows.columns):  # a list of predictions is often left lying about
            what = f"{data} holds both {tables[0].name} and {listing.words}"
            raise SourceError(f"{what}: move the CSV out of the folder to use the folders, or say data={tables[0]} to use the CSV")
        return rows
    if not listing.labelled:
        raise SourceError(
            f"{data}: no image found with a label, {len(listing.plain)} without. Looked for a CSV with a `file` column, for folders named "
            f"{', '.join(CLASSES)}, and for Images/ beside Labels/*.mat; images are {' '.join(SUFFIXES)}"
        )
    return listing

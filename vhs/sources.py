"""What a user brings -> a list of images with what is known of each.

Two layouts (more come with the study's own formats):
    a table   a CSV beside its images: `file`, and any of `patient`, `source`, `split`, `class`, and <point>_x, <point>_y for the view's key points
    folders   [train/ valid/ test/] small/ normal/ large/ *.png, in any case and however deep they were zipped
"""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass
from pathlib import Path

from vhs.measure import CLASSES, View

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")
SPLITS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}


class SourceError(Exception):
    """A data folder that cannot be used as it is; the message says what was looked for and found."""


@dataclass(frozen=True)
class Source:
    """One image to ingest: where it is and what came with it. `points`: K pairs in original pixels. `label`: a class name."""

    file: str
    patient: str | None = None
    source: str | None = None
    label: str | None = None
    points: tuple[tuple[float, float], ...] | None = None
    split: str | None = None

    def as_dict(self) -> dict:
        return asdict(self)


def scan(data: str | Path, view: View) -> list[Source]:
    """Every image that `data` (a CSV, or a folder with one, or class folders) names, sorted by file. SourceError when nothing fits."""
    data = Path(data).expanduser()
    if not data.exists():
        raise SourceError(f"data = {str(data)!r} does not exist: give a folder, a CSV, or the word phantoms")
    tables = [data] if data.is_file() else sorted(data.glob("*.csv"))
    if len(tables) > 1:
        raise SourceError(f"{data} holds {len(tables)} CSV files ({', '.join(t.name for t in tables)}): name the one with the labels")
    found = _table(tables[0], view) if tables else _folders(data)
    if not found:
        raise SourceError(f"{data}: no image found. Looked for a CSV with a `file` column, or folders named {', '.join(CLASSES)} with {' '.join(SUFFIXES)}")
    return sorted(found, key=lambda item: item.file)


def _table(table: Path, view: View) -> list[Source]:
    with table.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        columns = reader.fieldnames or []
        if "file" not in columns:
            raise SourceError(f"{table}: needs a column `file`, has {', '.join(columns) or 'no header'}")
        pairs = [(f"{name}_x", f"{name}_y") for name in view.points]
        present = [name for pair in pairs for name in pair if name in columns]
        if present and len(present) < 2 * len(pairs):
            raise SourceError(f"{table}: {view.name} needs all of {', '.join(n for p in pairs for n in p)}; only {', '.join(present)} are there")
        if not present and "class" not in columns:
            raise SourceError(f"{table}: needs `class` or the key points of {view.name} ({', '.join(n for p in pairs for n in p)})")
        return [_row(row, table, pairs if present else [], number) for number, row in enumerate(reader, start=2)]


def _row(row: dict, table: Path, pairs: list, number: int) -> Source:
    """One line of the table. A missing or malformed point leaves the image without points; ingest rejects it if it has no class either."""
    here = table.parent
    if not row["file"]:
        raise SourceError(f"{table}, line {number}: names no file")
    file = next((f for f in (here / row["file"], here / "images" / row["file"]) if f.is_file()), here / row["file"])
    try:
        points = tuple((float(row[x]), float(row[y])) for x, y in pairs) or None
    except (TypeError, ValueError):
        points = None
    label = (row.get("class") or "").strip().lower() or None
    if label and label not in CLASSES:
        raise SourceError(f"{table}, line {number}: class {label!r}; legal: {', '.join(CLASSES)}")
    said = (row.get("split") or "").strip().lower()
    if said and said not in SPLITS:
        raise SourceError(f"{table}, line {number}: split {said!r}; legal: {', '.join(SPLITS)}, or empty")
    split = SPLITS.get(said)
    return Source(str(file), row.get("patient") or None, row.get("source") or None, label, points, split)


def _folders(data: Path) -> list[Source]:
    found = []
    for file in data.rglob("*"):
        if file.suffix.lower() not in SUFFIXES:
            continue
        parents = [part.lower() for part in file.relative_to(data).parts[:-1]]
        label = next((part for part in reversed(parents) if part in CLASSES), None)
        if label:
            found.append(Source(str(file), label=label, split=next((SPLITS[part] for part in parents if part in SPLITS), None)))
    return found

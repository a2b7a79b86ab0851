"""A CSV beside its images.

    with a header      `file` (or Filename, ImageName), and any of `patient`, `source`, `split`, `class`, the index (VHS, CTR), and
                       <point>_x, <point>_y for the view's key points
    without a header   name,value: a class name, an index, or a class number, whose order has to be told

Separated by commas, or throughout by semicolons or tabs, as spreadsheets of some countries write it; decimals have a point. LF and CRLF, with and without a
byte-order mark. An image is looked for under its name beside the CSV, in images/, then anywhere below; never
elsewhere, and no URL is followed.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import PurePosixPath

from vhs.measure import CLASSES, View
from vhs.sources.source import NO_LABEL, ORPHAN, SPLITS, SUFFIXES, Place, Source, SourceError, class_of, faulty_points, inside, typed

FILE = ("file", "filename", "imagename", "image_name", "image")  # what the field calls the column, in any case
CLASS = ("class", "label")
ORDERS = (("large", "normal", "small"), ("small", "normal", "large"))  # of the class numbers 0, 1, 2; both are in use
MOST_BYTES = 1 << 28  # of a table: a million lines have a tenth
NUMBERS = {"0", "1", "2"}


@dataclass(frozen=True)
class Rows:
    """A CSV's lines as column -> text, column names in lower case. `header`: it had one; else its columns are called here."""

    path: str
    columns: tuple[str, ...]
    lines: list[dict[str, str]]
    header: bool

    def column(self, *names: str) -> str | None:
        return next((name for name in names if name in self.columns), None)

    def values(self, column: str | None) -> set[str]:
        return {line[column] for line in self.lines if line[column]} if column else set()


def load(place: Place, name: str) -> Rows:
    """The table `name`, which lies at the top of the place."""
    path, data = typed(place, name), place.read(name, 0, MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise SourceError(f"{path} is longer than the {MOST_BYTES} bytes that a table may have")
    try:
        text = data.decode("utf-8-sig")
        lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text, newline=""), delimiter=_separator(text)) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} is no CSV in UTF-8: {error}") from None
    header = bool(lines) and PurePosixPath(lines[0][0]).suffix.lower() not in SUFFIXES  # the field's evaluators start with the first image
    if header:
        columns, lines = [name.lower() for name in lines[0]], lines[1:]
    else:
        named = all(class_of(line[1]) or line[1] in NUMBERS for line in lines if len(line) > 1)
        columns = ["file", "class" if named else "index"]
    for number, line in enumerate(lines, start=1 + header):
        if len(line) > len(columns):
            raise SourceError(f"{path}, line {number}: {len(line)} cells, the columns are {', '.join(columns)}")
    return Rows(path, tuple(columns), [dict(zip(columns, line + [""] * len(columns), strict=False)) for line in lines], header)


def _separator(text: str) -> str:
    """What stands between cells: a comma, unless another sign alone makes a header, or the name of an image, of the first line."""
    first = text.lstrip().partition("\n")[0]
    for sign in ",;\t":
        cells = [cell.strip().strip('"').lower() for cell in first.split(sign)]
        if any(cell in FILE for cell in cells) or (len(cells) > 1 and PurePosixPath(cells[0]).suffix in SUFFIXES):
            return sign
    return ","


def describe(rows: Rows) -> str:
    return f"the CSV {PurePosixPath(rows.path).name} " + (
        f"with the columns {', '.join(rows.columns)}" if rows.header else f"without a header (name, {rows.columns[1]})"
    )


def read(rows: Rows, view: View, class_order: tuple[str, ...] | None, place: Place, names: list[str], rest: bool) -> list[Source]:
    """One source a line; with `rest`, also the images among `names`, all files of the place, that no line names."""
    file = rows.column(*FILE)
    if file is None:
        raise SourceError(f"{rows.path}: needs a column `file`, has {', '.join(rows.columns) or 'no header'}")
    points = [f"{name}_{axis}" for name in view.points for axis in "xy"]
    present = [name for name in points if name.lower() in rows.columns]
    if present and len(present) < len(points):
        raise SourceError(f"{rows.path}: {view.name} needs all of {', '.join(points)}; only {', '.join(present)} are there")
    label, index = rows.column(*CLASS), rows.column(view.index.lower(), "index")
    if not (present or label or index):
        raise SourceError(f"{rows.path}: needs `class`, `{view.index}` or the key points of {view.name} ({', '.join(points)})")
    order = class_numbers(rows.values(label), class_order, rows.path)
    there, images, found = set(names), _images(names), []
    for number, line in enumerate(rows.lines, start=1 + rows.header):
        where = f"{rows.path}, line {number}"
        if not line[file]:
            raise SourceError(f"{where}: names no file")
        image, reject = _find(line[file], place, there, images)
        pairs, fault = key_points(line, view) if present else (None, None)
        value, stated = number_of(line, index, where), class_in(line, label, order, where)
        split = split_of(line, where)
        known = pairs or stated or value is not None
        found.append(
            Source(
                image, line.get("patient") or None, line.get("source") or None, stated, pairs, split, value,
                reject=reject or fault or (None if known or split == "test" else NO_LABEL),
            )
        )  # fmt: skip
    if rest:
        named, table = {source.file for source in found}, PurePosixPath(rows.path).name
        everything = sorted({image for group in images.values() for image in group})
        found += [Source(image, reject=f"image without a label in {table}") for image in everything if image not in named]
    return found


def _images(names: list[str]) -> dict[str, list[str]]:
    """Images among `names` by their own name and by stem (student tables leave the suffix out)."""
    images = defaultdict(list)
    for image in sorted(map(PurePosixPath, names)):
        if image.suffix.lower() in SUFFIXES and not image.name.startswith("."):
            images[image.name].append(str(image))
            images[image.stem].append(str(image))
    return images


def _find(name: str, place: Place, there: set[str], images: dict[str, list[str]]) -> tuple[str, str | None]:
    """-> (the image that a table calls `name`, the reason why there is none)."""
    short, refused = inside(name, place)
    if not refused and (beside := next((file for file in (short, f"images/{short}") if file in there), None)):
        return beside, None
    below = images.get(PurePosixPath(short).name, []) if "://" not in name else []
    if len(below) == 1:
        return below[0], None
    return short, f"{len(below)} images of this name: {', '.join(below)}" if below else refused or ORPHAN


def key_points(line: dict, view: View) -> tuple[tuple[tuple[float, float], ...] | None, str | None]:
    """-> (the key points of a line or None, the reason why they cannot be used). A line may have none; half of them is damage."""
    cells = [[line[f"{name}_{axis}".lower()] for axis in "xy"] for name in view.points]
    if not any(cell for pair in cells for cell in pair):
        return None, None
    points = tuple((_float(x), _float(y)) for x, y in cells)
    fault = faulty_points(points, view)
    return (None, fault) if fault else (points, None)


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def number_of(line: dict, column: str | None, where: str) -> float | None:
    if not column or not line[column]:
        return None
    try:
        return float(line[column])
    except ValueError:
        raise SourceError(f"{where}: {column} {line[column]!r} is no number" + (": decimals have a point" if "," in line[column] else "")) from None


def class_numbers(values: set[str], class_order: tuple[str, ...] | None, where: str) -> tuple[str, ...] | None:
    """The classes that the numbers 0, 1, 2 stand for, None where `values` holds names. They are never guessed: SourceError."""
    if not values or not values <= NUMBERS:
        return None
    if class_order is None:
        either = " or ".join(
            f"ingest.class_order=[{','.join(order)}] ({why})" for order, why in zip(ORDERS, ("folder order", "by size"), strict=True)
        )
        raise SourceError(
            f"{where} gives classes as the numbers 0, 1, 2 and does not say which is which; the field uses two orders. Set {either}"
        )
    return class_order


def class_in(line: dict, column: str | None, order: tuple[str, ...] | None, where: str) -> str | None:
    said = line[column] if column else ""
    label = order[int(said)] if order and said in NUMBERS else class_of(said)
    if said and not label:
        raise SourceError(f"{where}: class {said.lower()!r}; legal: {', '.join(CLASSES)}")
    return label


def split_of(line: dict, where: str) -> str | None:
    said = line.get("split", "").lower()
    if said and said not in SPLITS:
        raise SourceError(f"{where}: split {said!r}; legal: {', '.join(SPLITS)}, or empty")
    return SPLITS.get(said)

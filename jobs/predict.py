"""`vhs predict`: files in, points, index, class and spread out, with a picture of each measurement if wanted. Outside a run's chain."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jobs import models, plan
from jobs.config import ConfigError
from jobs.data import read_file
from shards.sample import sample_key
from shards.storage import open_storage
from vhs.contained import Contained, Died
from vhs.labelling import Labeller
from vhs.measure import CLASSES, VIEWS, View
from vhs.radiograph import Letterbox, Unreadable, decode
from vhs.sources import SUFFIXES
from vhs.verdict import Measurement, plausible

CHUNK = 16  # files in memory at once


@dataclass(frozen=True)
class Prediction:
    """One file's measurement; `points` [K, 2] in the file's own pixels. `note`: why it should not be trusted, or why the file was not read."""

    file: str
    points: np.ndarray | None = None
    index: float = float("nan")
    spread: float = float("nan")
    label: str = ""
    note: str = ""


def open_labeller(model: str) -> Labeller:
    """`model`: a view's name (the labeller that travels with the program), a labeller's folder, or a run (the labeller of its test split); the last two here
    or in object storage."""
    if model in VIEWS:
        return Labeller.packaged(model)
    if open_storage(model).exists("plan.json"):
        run = plan.reopen(model)
        made = [name for name in run.names if name.startswith("labeller/split-") and name.endswith(".json")]
        if not made:
            raise ValueError(f"{model} has no labeller yet: finish its stage with vhs stage labeller {model}")
        return replace(Labeller.load(run.storage.local(run.marker(made[0]).folder)), view=run.config.measure)
    if not open_storage(model).exists("config.json"):
        raise ValueError(f"no model {model!r}: give {', '.join(VIEWS)}, a labeller's folder, or a run")
    return Labeller.load(Path(models.here(model)))


def listed(files: list[str]) -> list[str]:
    """`files`, and in place of each folder of this machine the images in it, however deep, sorted. ConfigError for a folder without one."""
    found = []
    for file in files:
        if not Path(file).is_dir():
            found.append(file)
            continue
        inside = [name for name in open_storage(file).list() if name.lower().endswith(SUFFIXES) and not Path(name).name.startswith(".")]
        if not inside:
            raise ConfigError(f"{file} is a folder without an image: {' '.join(SUFFIXES)} are looked for")
        found += [str(Path(file) / name) for name in inside]
    return found


def predict(labeller: Labeller, files: list[str], passes: int = 8, overlays: Path | None = None) -> Iterator[Prediction]:
    """Every file, in order; one that cannot be read is among them, with the reason. `overlays`: a folder for pictures of the measurements."""
    with Contained() as contained:
        for start in range(0, len(files), CHUNK):
            yield from _chunk(labeller, files[start : start + CHUNK], passes, overlays, contained)


def _chunk(labeller: Labeller, files: list[str], passes: int, overlays: Path | None, contained: Contained) -> Iterator[Prediction]:
    view, images, keys, unreadable = labeller.view, {}, [], {}
    for number, file in enumerate(files):
        try:
            data = read_file(file)
            images[number] = contained.call(decode, data, Path(file).name)
            keys.append(sample_key(data))
        except (OSError, Unreadable, Died) as error:
            unreadable[number] = f"not read: {error}"
    boxes = {number: Letterbox(image.shape[1], image.shape[0], labeller.size_px) for number, image in images.items()}
    found = labeller.measure(np.stack([boxes[n].image(image) for n, image in images.items()]), keys, passes) if images else None
    notes = _notes(labeller, found) if images else []
    rows = {number: row for row, number in enumerate(images)}
    for number, file in enumerate(files):
        if number in unreadable:
            yield Prediction(file, note=unreadable[number])
            continue
        row, index = rows[number], float(found.index[rows[number]])
        label = CLASSES[int(view.classify(index))] if np.isfinite(index) else ""
        result = Prediction(file, boxes[number].inverse(found.points[row]), index, float(found.spread[row]), label, notes[row])
        if overlays:
            _picture(result, images[number], view, overlays)
        yield result


def _notes(labeller: Labeller, found: Measurement) -> list[str]:
    """Why each measurement should not be trusted, "" where nothing speaks against it."""
    if labeller.thresholds:
        return [reason for _, reason in labeller.verdict(found)]
    return ["" if ok else "implausible geometry" for ok in plausible(found, labeller.view)]


def _picture(item: Prediction, image: np.ndarray, view: View, folder: Path):
    """<folder>/<file's path>.png: the image with its key points, index and class."""
    import cv2

    from vhs.report.overlay import overlay

    drawn = overlay(image, item.points, view, caption(item, view), scale=max(1, 640 // max(image.shape)))
    target = folder / f"{Path(item.file).name}.png"
    for number in itertools.count(2):  # files of one name from several folders keep a picture each
        if not target.exists():
            break
        target = folder / f"{Path(item.file).name}-{number}.png"
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(target), drawn[..., ::-1])


def caption(item: Prediction, view: View) -> str:
    """One line on a measurement."""
    measured = f"{view.index} {item.index:.2f} +- {item.spread:.2f} {item.label}" if item.points is not None else ""
    return " ".join(filter(None, [measured, item.note]))


def as_csv(predictions: list[Prediction], view: View) -> str:
    """file as given, index, class, spread, note and the key points in original pixels (x right, y down)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", view.index, "class", "spread", "note", *(f"{name}_{axis}" for name in view.points for axis in "xy")])
    for item in predictions:
        points = [""] * (2 * len(view.points)) if item.points is None else [f"{value:.1f}" for value in item.points.ravel()]
        figures = ["", ""] if item.points is None else [f"{item.index:.4f}", f"{item.spread:.4f}"]
        writer.writerow([item.file, figures[0], item.label, figures[1], item.note, *points])
    return out.getvalue()

"""`vhs predict`: files in, points, index, class and spread out, with a picture of each measurement if wanted. Outside a run's chain."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs import models, plan
from vhs.labelling import Labeller, plausible, verdict
from vhs.measure import CLASSES, VIEWS, View
from vhs.radiograph import Letterbox, Unreadable, decode


@dataclass(frozen=True)
class Prediction:
    """One file's measurement; `points` [K, 2] in the file's own pixels. `note`: why it should not be trusted, or why the file was not read."""

    file: str
    image: np.ndarray | None
    points: np.ndarray | None
    index: float
    spread: float
    label: str
    note: str


def open_labeller(model: str) -> Labeller:
    """`model`: a view's name (the labeller that travels with the program), a labeller's folder, or a run (the labeller of its test split)."""
    if model in VIEWS:
        return Labeller.load(models.WEIGHTS / "labeller" / model)
    if (Path(model) / "plan.json").is_file():
        run = plan.reopen(model)
        made = [name for name in run.names if name.startswith("labeller/split-") and name.endswith(".json")]
        if not made:
            raise ValueError(f"{model} has no labeller yet: finish its stage with vhs stage labeller {model}")
        return Labeller.load(run.storage.local(run.marker(made[0]).folder))
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"no model {model!r}: give {', '.join(VIEWS)}, a labeller's folder, or a run")
    return Labeller.load(Path(model))


def predict(labeller: Labeller, files: list[Path], passes: int = 8) -> list[Prediction]:
    """Every file, in order; one that cannot be read is among them, with the reason."""
    read: list[tuple[Path, np.ndarray | None, str]] = []
    for file in files:
        try:
            read.append((file, decode(file.read_bytes(), file.name), ""))
        except (OSError, Unreadable) as error:
            read.append((file, None, f"not read: {error}"))
    boxes = {file: Letterbox(image.shape[1], image.shape[0], labeller.size_px) for file, image, _ in read if image is not None}
    if not boxes:
        return [Prediction(str(file), None, None, np.nan, np.nan, "", note) for file, _, note in read]
    squares = np.stack([boxes[file].image(image) for file, image, _ in read if image is not None])
    found = labeller.measure(squares, [file.name for file in boxes], passes)
    notes = (
        [reason for _, reason in verdict(found, labeller.thresholds, labeller.view)]
        if labeller.thresholds
        else ["" if ok else "implausible geometry" for ok in plausible(found, labeller.view)]
    )
    row = {file: n for n, file in enumerate(boxes)}
    return [
        _prediction(labeller.view, file, image, boxes, found, row[file], notes)
        if image is not None
        else Prediction(str(file), None, None, np.nan, np.nan, "", note)
        for file, image, note in read
    ]


def _prediction(view: View, file: Path, image: np.ndarray, boxes: dict, found, n: int, notes: list[str]) -> Prediction:
    index = float(found.index[n])
    label = CLASSES[int(view.classify(index))] if np.isfinite(index) else ""
    return Prediction(str(file), image, boxes[file].inverse(found.points[n]), index, float(found.spread[n]), label, notes[n])


def as_csv(predictions: list[Prediction], view: View) -> str:
    """file, index, class, spread, note and the key points in original pixels (x right, y down)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["file", view.index, "class", "spread", "note", *(f"{name}_{axis}" for name in view.points for axis in "xy")])
    for item in predictions:
        points = [""] * (2 * len(view.points)) if item.points is None else [f"{value:.1f}" for value in item.points.ravel()]
        figures = ["", ""] if item.points is None else [f"{item.index:.4f}", f"{item.spread:.4f}"]
        writer.writerow([Path(item.file).name, figures[0], item.label, figures[1], item.note, *points])
    return out.getvalue()


def write_overlays(predictions: list[Prediction], view: View, folder: Path):
    """<folder>/<file name>.png: the image with its key points, index and class."""
    import cv2

    from vhs.report.overlay import overlay

    folder.mkdir(parents=True, exist_ok=True)
    for item in predictions:
        if item.image is not None:
            scale = max(1, 640 // max(item.image.shape))
            drawn = overlay(
                item.image, item.points, view, f"{view.index} {item.index:.2f} +- {item.spread:.2f} {item.label} {item.note}", scale=scale
            )
            cv2.imwrite(str(folder / f"{Path(item.file).name}.png"), drawn[..., ::-1])

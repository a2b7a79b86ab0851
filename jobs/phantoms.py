"""`vhs phantom`: a folder of drawn radiographs with exact key points, laid out as a user's own data would be."""

from __future__ import annotations

import csv
from pathlib import Path

from vhs.measure import CLASSES, VIEWS
from vhs.phantom import draw
from vhs.radiograph import encode_png


def write(
    folder: Path, view_name: str, style: str, count: int, seed: int, size_px: int, prior: tuple[float, float, float]
) -> dict[str, int]:
    """`folder`/images/*.png and `folder`/labels.csv (file, patient, source, class, index, key points) -> images of each class."""
    view, counts = VIEWS[view_name], dict.fromkeys(CLASSES, 0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / "labels.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["file", "patient", "source", "class", view.index, *(f"{name}_{axis}" for name in view.points for axis in "xy")])
        for number in range(count):
            phantom = draw(view_name, style, seed * 1_000_000 + number, size_px=size_px, prior=prior)
            label, file = CLASSES[int(view.classify(phantom.index))], f"phantom-{number:05d}.png"
            (folder / "images" / file).write_bytes(encode_png(phantom.image))
            writer.writerow(
                [file, f"patient-{number:05d}", style, label, f"{phantom.index:.4f}", *(f"{v:.3f}" for v in phantom.points.ravel())]
            )
            counts[label] += 1
    return counts

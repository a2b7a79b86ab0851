"""Contact sheets of a run's images: which images the report shows, and what is drawn on them."""

from __future__ import annotations

import numpy as np
import pandas as pd

from jobs import batches
from vhs.measure import CLASSES
from vhs.report import captioned, contact_sheet, fitted, overlay

SHOWN, SHOWN_DRAWN = 4, 3  # images of each class on a sheet, without and with axes; of each reason too
PAIRS = 6
PLAIN_PX, DRAWN_PX = 144, 224  # a tile's side


def plain(inputs, rows: pd.DataFrame) -> bytes:
    """SHOWN images of each class, one row a class, as they are. Places without an image stay empty, so that two sheets stand side by side."""
    chosen = [rows[rows.label == label].head(SHOWN) for label in range(len(CLASSES))]
    images = iter(batches.load_images(inputs.storage, pd.concat(chosen)))
    tiles = []
    for of_class in chosen:
        tiles += [fitted(next(images), PLAIN_PX)[0] for _ in range(len(of_class))]
        tiles += [np.zeros((PLAIN_PX, PLAIN_PX, 4), np.uint8)] * (SHOWN - len(of_class))
    return contact_sheet(tiles, SHOWN)


def true(config, inputs, rows: pd.DataFrame) -> bytes | None:
    """Real images of each class with their true axes; None if none has key points."""
    rows = rows[rows.points.notna() & (rows.label >= 0)].groupby("label").head(SHOWN_DRAWN).sort_values("label", kind="stable")
    if rows.empty:
        return None
    return _drawn(config, inputs, rows, batches.network_points(rows, config.resolution), [""] * len(rows))


def measured(config, inputs, rows: pd.DataFrame) -> bytes:
    """Generated images of each measured class with their measured axes."""
    rows = rows.groupby("label").head(SHOWN_DRAWN).sort_values("label", kind="stable")
    return _drawn(config, inputs, rows, _points(rows), [""] * len(rows))


def rejected(config, inputs, rows: pd.DataFrame) -> bytes:
    """Rejected images, a row for each reason."""
    rows = rows.groupby("reason").head(SHOWN_DRAWN).sort_values("reason", kind="stable")
    return _drawn(config, inputs, rows, _points(rows), [f", {reason}" for reason in rows.reason], rows.reason.tolist())


def pairs(inputs, near: pd.DataFrame, real: pd.DataFrame, side: str) -> bytes:
    """The images of `near` (metrics.nearest's columns) that come closest to one of `real`, on this side, each left of that image: a copy would show."""
    rows = near.sort_values([f"to_{side}", "key"]).head(PAIRS)
    images = batches.load_images(inputs.storage, rows)
    nearest = batches.load_images(inputs.storage, real.set_index("key", drop=False).loc[rows[side]])
    captions = [f"generated, {distance:.2f} away" for distance in rows[f"to_{side}"]]
    tiles = [captioned(fitted(image, PLAIN_PX)[0], caption) for image, caption in zip(images, captions)]
    matches = [captioned(fitted(image, PLAIN_PX)[0], "its nearest") for image in nearest]
    return contact_sheet([tile for pair in zip(tiles, matches) for tile in pair], 4)


def _points(rows: pd.DataFrame) -> np.ndarray:
    return np.stack([np.asarray(points, np.float32).reshape(-1, 2) for points in rows.points])


def _drawn(config, inputs, rows: pd.DataFrame, points: np.ndarray, remarks: list[str], groups: list | None = None) -> bytes:
    """The images of `rows` with `points` [n, K, 2] on them and the index below; each of `groups` (default: all) begins a row of its own."""
    view, tiles = config.measure, {}
    images = batches.load_images(inputs.storage, rows)
    for image, spots, index, remark, group in zip(images, points, rows["index"], remarks, groups or rows.label):
        small, scale = fitted(image, DRAWN_PX)
        tiles.setdefault(group, []).append(overlay(small, (spots + 0.5) * scale - 0.5, view, f"{view.index} {index:.2f}{remark}"))
    empty = np.zeros((DRAWN_PX, DRAWN_PX, 4), np.uint8)
    return contact_sheet([tile for of_group in tiles.values() for tile in of_group + [empty] * (SHOWN_DRAWN - len(of_group))], SHOWN_DRAWN)

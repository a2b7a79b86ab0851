"""How the generated images of a scope stand to its real ones, for the report: do they look alike, and do they repeat what their generator learnt from.

All is measured on the images that were accepted, by the scope's labeller; it describes, and decides on no image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from jobs.lineage import ScopeRows

CHUNK = 256  # images in memory at a time
NEARER = "nearer to training"  # in the summary and above a column


@dataclass(frozen=True)
class Seen:
    """N images as the labeller knows them again: hashes, features [N, C] (vhs/verdict.py); and `look` [N, d], by what their looks are compared."""

    hashes: tuple[str, ...]
    features: np.ndarray
    look: np.ndarray


class Eyes:
    """The scope's labeller and, if the configuration gives its weights, the FID's Inception for looks."""

    def __init__(self, config, inputs):
        from jobs import models, world
        from vhs import inception
        from vhs.labelling import Labeller

        device = world.device(config.execution.device)
        self._storage, self._labeller = inputs.storage, Labeller.load(inputs.folder("labeller")).to(device)
        self._inception = inception.load(models.here(config.report.inception)).to(device) if config.report.inception else None
        self.copies = self._labeller.copies

    def see(self, rows: pd.DataFrame) -> Seen:
        from jobs import batches
        from vhs import inception

        hashes, features, looks = (), [np.zeros((0, 0), np.float32)], []
        for start in range(0, len(rows), CHUNK):
            part = rows.iloc[start : start + CHUNK]
            images = batches.load_images(self._storage, part)
            measured = self._labeller.measure(images, part.key.tolist(), passes=1)
            hashes += measured.hashes
            features.append(measured.features)
            looks.append(inception.features(self._inception, images) if self._inception else measured.features)
        whole = np.concatenate(features[1:] or features)
        return Seen(hashes, whole, np.concatenate(looks) if looks else whole)


def compare(config, inputs, scope: ScopeRows, accepted: dict[str, pd.DataFrame], own: str) -> tuple[dict, dict[str, pd.DataFrame], pd.DataFrame | None]:
    """The accepted images of each generator beside the scope's training and held-out images -> the summary's figures (README), the page's tables, and what
    lies nearest to each image of the run's `own` generator: its rows with metrics.nearest's columns, None where that cannot be said."""
    from vhs import metrics

    eyes, said, near = Eyes(config, inputs), {}, None
    real, held_out = scope.training.assign(feature=list(eyes.see(scope.training).look)), eyes.see(scope.held_out)
    frechet, distances = pd.DataFrame(), pd.DataFrame()
    for name, rows in accepted.items():
        seen = eyes.see(rows)
        drawn = rows.assign(feature=list(seen.look))
        found, nearer = _nearest(eyes.copies, scope, rows, seen, held_out)
        probe = metrics.probe_auroc(real, drawn) if name != "null" else None  # of a copy in one fold and its original in another it learns the wrong answer
        said[name] = {"images": len(rows), "probe": probe, NEARER: nearer}
        if name == own:
            near, frechet = found, metrics.frechet_by_class(real, drawn)
    if near is not None and len(near):
        distances = metrics.distances_by_class(near, _to_training(eyes.copies, scope, held_out))
    mine, others = said.get(own, {"probe": None, NEARER: None}), {name: figures for name, figures in said.items() if name != own}
    figures = {"features": "Inception pool3" if config.report.inception else "labeller features", "classes": _plain(frechet), "probe": mine["probe"]}
    figures |= {"nearest": _plain(distances), NEARER: mine[NEARER], "others": others}
    return figures, {"likeness": frechet, "nearest": distances} | _by_generator(said, own), near


def _by_generator(said: dict[str, dict], own: str) -> dict[str, pd.DataFrame]:
    """A row a generator: can its images be told from real ones, and do they lie nearer to training ones."""
    probes, nearer = [], []
    for name, figures in said.items():
        row = {"generator": "this run's DreamBooth" if name == own else name, "images": figures["images"]}
        probes.append(row | {"AUROC": (figures["probe"] or {"auroc": np.nan})["auroc"]})
        if found := figures[NEARER]:
            low, high = found["chance"]
            nearer.append(row | {NEARER: found["images"], "share, %": 100 * found["share"], "by chance from": 100 * low, "to": 100 * high})
    return {"probes": pd.DataFrame(probes), "nearer": pd.DataFrame(nearer)}


def _nearest(copies, scope: ScopeRows, rows: pd.DataFrame, seen: Seen, held_out: Seen) -> tuple[pd.DataFrame | None, dict | None]:
    """`rows` with what lies nearest to each, and how many lie nearer to training; None where one patient leaves no distance to measure by."""
    from vhs import metrics

    if copies is None:
        return None, None
    known = _columns(copies, scope)

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(rows), CHUNK):
            some = seen.hashes[start : start + CHUNK], seen.features[start : start + CHUNK]
            yield np.hstack([copies.distances(*some)[:, known], copies.distances(*some, (held_out.hashes, held_out.features))])

    real = pd.concat([scope.training.assign(held_out=False), scope.held_out.assign(held_out=True)], ignore_index=True)
    found, nearer = metrics.nearest(blocks(), real)
    return pd.concat([rows.reset_index(drop=True), found], axis=1), nearer


def _to_training(copies, scope: ScopeRows, held_out: Seen) -> pd.DataFrame:
    """The held-out images' label and distance to their nearest training image."""
    away = copies.distances(held_out.hashes, held_out.features)[:, _columns(copies, scope)]
    return pd.DataFrame({"label": scope.held_out.label, "to_training": away.min(1)})


def _columns(copies, scope: ScopeRows) -> list[int]:
    """Of the images that the labeller knows those that the generator learnt from, in the order of the scope's rows: the inner validation is none."""
    number = {key: n for n, key in enumerate(copies.keys)}
    return [number[key] for key in scope.training.key]


def _plain(by_class: pd.DataFrame) -> dict[str, dict]:
    """{class: its row}, ready for JSON."""
    rows = by_class.astype(object).where(by_class.notna(), None).to_dict("records")
    return {row.pop("class"): row for row in rows}

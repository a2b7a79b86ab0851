"""Do generated images lie nearer to the images that their generator learnt from than to others of their kind, which it never saw?

One that has learnt what radiographs look like lies as near to the ones as to the others: held-out images are the yardstick (Meehan, Chaudhuri & Dasgupta,
AISTATS 2020, arXiv:2004.05675). Of a side with more images one is nearest more often, and classes and sources differ, so each nearest image counts as if its
class and source had as many on either side; and a few dozen images differ by chance, so beside the share stands what random divisions of the same real
images into such sides give. Distances in, figures out: nothing here refuses an image.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from vhs.measure import CLASSES, UNKNOWN

DIVISIONS = 400
SIDES = ("training", "held_out")


def nearest(blocks: Iterable[np.ndarray], real: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, dict | None]:
    """What lies nearest to each generated image, a row each: training, held_out (keys), to_training, to_held_out (distances); and how many lie nearer
    to training, {"images": how many, "share", "chance": [low, high]}.

    `blocks`: distances [n, N] of the generated images in turn. `real`: the N images; key, patient, label, source, held_out (bool). `share`, of 0..1: about
    a half where nothing is memorised, however many images there are on either side. `chance`: 95 in 100 random divisions of the real images give a share
    between these. Images whose class and source are on one side alone are left out of that, and where held-out images have no labels sources alone
    count; None where nothing is left.
    """
    held, keys, kinds = real.held_out.to_numpy(), real.key.to_numpy(), _kinds(real)
    of_side, both = (np.flatnonzero(~held), np.flatnonzero(held)), np.flatnonzero(kinds >= 0)
    found, hits = [pd.DataFrame(columns=[*SIDES, *(f"to_{side}" for side in SIDES)])], np.zeros(len(real))
    for block in blocks:
        row = {}
        for side, there in zip(SIDES, of_side):
            row |= {side: keys[there[block[:, there].argmin(1)]], f"to_{side}": block[:, there].min(1)}
        found.append(pd.DataFrame(row))
        if len(both):
            np.add.at(hits, both[block[:, both].argmin(1)], 1)
    table = pd.concat(found[1:] or found, ignore_index=True)
    if not hits.any():
        return table, None
    rng, patients = np.random.default_rng(seed), pd.factorize(real.patient)[0]
    by_chance = [_share(hits, _divided(held, kinds, patients, rng), kinds) for _ in range(DIVISIONS)]
    return table, {"images": int(hits[~held].sum()), "share": _share(hits, held, kinds), "chance": np.quantile(by_chance, (0.025, 0.975)).tolist()}


def _kinds(real: pd.DataFrame) -> np.ndarray:
    """int [N]: the number of each image's class and source, -1 for one that has no image on the other side."""
    held = real.held_out
    by = ["label", "source"] if (real.label[held] != UNKNOWN).any() else ["source"]
    shared = held.groupby([real[column] for column in by], dropna=False).transform("nunique") == 2
    return np.where(shared, real.groupby(by, dropna=False).ngroup(), -1)


def _share(hits: np.ndarray, held: np.ndarray, kinds: np.ndarray) -> float:
    """Of all `hits`, how often each real image was the nearest, those on training images, each weighted by its kind's images over those on its side."""
    inside = kinds >= 0
    hits, held, kinds = hits[inside], held[inside], kinds[inside]
    of_kind, on_side = np.bincount(kinds), [np.bincount(kinds, side, kinds.max() + 1) for side in (~held, held)]
    weighted = hits * of_kind[kinds] / np.where(held, on_side[1][kinds], on_side[0][kinds])
    ours, theirs = weighted[~held].sum(), weighted[held].sum()
    return float(ours / (ours + theirs))


def _divided(held: np.ndarray, kinds: np.ndarray, patients: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [N]: who is held out in a random division with the same counts of each kind, a patient on one side as far as the counts allow."""
    rank, side = rng.permutation(patients.max() + 1)[patients], held.copy()
    for kind in range(kinds.max() + 1):
        rows = np.flatnonzero(kinds == kind)
        order = rows[np.lexsort((rng.permutation(len(rows)), rank[rows]))]
        side[order] = np.arange(len(rows)) >= (~held[rows]).sum()
    return side


def distances_by_class(generated: pd.DataFrame, held_out: pd.DataFrame) -> pd.DataFrame:
    """Medians by class and of all: label, to_training, to_held_out of generated images, label, to_training of held-out ones -> class, generated images,
    to training, to held-out, held-out images, held-out to training. An image without a label is in the last row alone."""
    rows = []
    for number, name in [*enumerate(CLASSES), (None, "all")]:
        drawn, real = (table if number is None else table[table.label == number] for table in (generated, held_out))
        rows.append({
            "class": name, "generated images": len(drawn), "to training": drawn.to_training.median(), "to held-out": drawn.to_held_out.median(),
            "held-out images": len(real), "held-out to training": real.to_training.median(),
        })  # fmt: skip
    return pd.DataFrame(rows)

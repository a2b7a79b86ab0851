"""How generated images differ from real ones, in the eyes of a frozen network: features [n, d] in, figures out.

A Fréchet distance means nothing without three things: whose features (the page names them), how many images (it is biased upwards on few:
Chong & Forsyth, arXiv:1911.07023), and what real images score against each other. So beside the usual figure over all images there is one
of as many images as half of the real ones, and the distance between two such halves, whole patients each.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from vhs.measure import CLASSES

DRAWS = 10
FEWEST = 4  # images of a class and origin: two halves of two, the least that have a covariance


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of the normal distributions fitted to features a [n, d] and b [m, d], n and m >= 2 (Heusel et al. 2017, eq. 6).

    |mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)). With A = X'X and B = Y'Y the last trace is the sum of the singular values of X Y': exact
    for singular covariances too, where the matrix root that is usually taken needs a fudge.
    """
    (mean_a, x), (mean_b, y) = (_root(values) for values in (a, b))
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    distance = max(0.0, ((mean_a - mean_b) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * shared)
    return float(f"{distance:.9g}")  # the last bits are other ones with every kind of CPU that BLAS knows


def _root(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [d], and X of at most d rows with X'X the covariance."""
    values = np.asarray(values, dtype=np.float64)
    x = (values - values.mean(0)) / np.sqrt(len(values) - 1)
    return values.mean(0), np.linalg.qr(x, mode="r") if len(x) > x.shape[1] else x


def frechet_by_class(real: pd.DataFrame, generated: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Columns label, patient (real only), feature ([d] each) -> class, real images, generated images, distance, and, with `images each` images on
    either side, real to generated and real to real.

    The last two are means over DRAWS draws; "real to real" is between two halves of the real images, no patient in both. Classes with under
    FEWEST images of an origin are left out; NaN where the real images cannot be halved.
    """
    rows, rng = [], np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        of_real, of_generated = real[real.label == label], generated[generated.label == label]
        if min(len(of_real), len(of_generated)) < FEWEST:
            continue
        ours, drawn = np.stack(of_real.feature), np.stack(of_generated.feature)
        halves = [_halves(of_real.patient.to_numpy(), rng) for _ in range(DRAWS)]
        each = min(len(drawn), *(len(half) for pair in halves for half in pair))
        row = {"class": name, "real images": len(ours), "generated images": len(drawn), "distance": frechet_distance(ours, drawn)}
        if each >= 2:
            pairs = [(ours[a[:each]], ours[b[:each]], drawn[rng.permutation(len(drawn))[:each]]) for a, b in halves]
            row |= {"images each": each, "real to generated": float(np.mean([frechet_distance(a, g) for a, _, g in pairs]))}
            row |= {"real to real": float(np.mean([frechet_distance(a, b) for a, b, _ in pairs]))}
        rows.append(row)
    return pd.DataFrame(rows, columns=["class", "real images", "generated images", "distance", "images each", "real to generated", "real to real"])


def _halves(patients: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two halves, whole patients each, in random order; one of them may be empty if there is a single patient."""
    codes, names = pd.factorize(patients)
    rank = rng.permutation(len(names))[codes]
    order = np.lexsort((rng.permutation(len(codes)), rank))
    middle = rank[order[(len(order) - 1) // 2]]
    return order[rank[order] <= middle], order[rank[order] > middle]


def probe_auroc(real: pd.DataFrame, generated: pd.DataFrame, folds: int = 5, seed: int = 0) -> dict | None:
    """Can a linear probe tell the origins apart? Columns as in `frechet_by_class` -> {"auroc", "images"}; 0.5: it cannot, 1: always.

    Logistic regression on standardised features, mean AUROC over folds that keep a patient together. Of each class as many images of either
    origin: the class mix must not tell. None with under `folds` images of each origin.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng, chosen = np.random.default_rng(seed), []
    generated = generated.assign(patient=[f"generated {i}" for i in range(len(generated))])
    for label in range(len(CLASSES)):
        origins = [table[table.label == label] for table in (real, generated)]
        count = min(map(len, origins))
        chosen += [table.iloc[rng.permutation(len(table))[:count]].assign(drawn=origin) for origin, table in enumerate(origins)]
    both = pd.concat(chosen, ignore_index=True)
    if both[both.drawn == 0].patient.nunique() < folds:
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    areas = cross_val_score(probe, np.stack(both.feature), both.drawn, groups=both.patient, cv=parts, scoring="roc_auc")
    return {"auroc": float(areas.mean()), "images": len(both)}

"""How well the labeller measures: its index beside the true one on real images that it never saw."""

from __future__ import annotations

import numpy as np
import pandas as pd


def bland_altman(measured: np.ndarray, true: np.ndarray) -> dict | None:
    """Agreement of two measurements of the same images (Bland & Altman, Lancet 327:307, 1986), in the index's units.

    -> {"images", "mae", "bias": mean of measured - true, "limits": [low, high]: bias -+ 1.96 standard deviations, or None of one image};
    pairs of which one is not finite are left out, None if none is left.
    """
    difference = np.asarray(measured, dtype=float) - np.asarray(true, dtype=float)
    difference = difference[np.isfinite(difference)]
    if not len(difference):
        return None
    bias, half = float(difference.mean()), 1.96 * float(difference.std(ddof=1)) if len(difference) > 1 else None
    limits = None if half is None else [bias - half, bias + half]
    return {"images": len(difference), "mae": float(np.abs(difference).mean()), "bias": bias, "limits": limits}


def labeller_quality(measured: pd.DataFrame) -> dict:
    """Real images' label, predicted class, index (true or NaN), measured (NaN where points coincide), spread ->

    {"class_accuracy", "index_mae", "bias", "limits": [low, high], "spread_rank"}; all but the first None where no true index is known.
    `spread_rank` is Spearman's correlation of the spread with the absolute error: above 0, a doubtful measurement is a worse one.
    """
    from scipy.stats import spearmanr

    known = measured.dropna(subset=["index", "measured"])
    found = bland_altman(known.measured, known["index"]) or {"mae": None, "bias": None, "limits": None}
    error, ranked = (known.measured - known["index"]).abs(), None
    if len(known) > 2 and error.nunique() > 1 and known.spread.nunique() > 1:
        ranked = float(spearmanr(known.spread, error).statistic)
    return {
        "class_accuracy": float((measured.predicted == measured.label).mean()),
        "index_mae": found["mae"], "bias": found["bias"], "limits": found["limits"], "spread_rank": ranked,
    }  # fmt: skip


def measurement_by(measured: pd.DataFrame, column: str) -> pd.DataFrame:
    """`bland_altman` within each value of `column`, images without a true or a measured index left out: <column>, images, mae, bias, lower, upper limit."""
    rows = []
    for value, group in measured.dropna(subset=["index", "measured"]).groupby(column):
        found = bland_altman(group.measured, group["index"])
        low, high = found.pop("limits") or (np.nan, np.nan)
        rows.append({column: value, **found, "lower limit": low, "upper limit": high})
    return pd.DataFrame(rows, columns=[column, "images", "mae", "bias", "lower limit", "upper limit"])

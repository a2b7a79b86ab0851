"""What became of the generated images: asked for, produced, accepted, and why not."""

from __future__ import annotations

import numpy as np
import pandas as pd

from vhs.measure import CLASSES, UNKNOWN, View


def generated_counts(generated: pd.DataFrame, asked: int) -> dict:
    """Generated images' prompted, measured (class positions), accepted (bool) -> {"asked", "produced", "accepted", "agreement"}.

    `agreement` is the share of the produced images that have a prompted class (else UNKNOWN) whose measured class it is, None if there are none.
    """
    prompted = generated[generated.prompted != UNKNOWN]
    agreement = float((prompted.prompted == prompted.measured).mean()) if len(prompted) else None
    return {"asked": int(asked), "produced": len(generated), "accepted": int(generated.accepted.sum()), "agreement": agreement}


def generated_tables(generated: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Counts by prompted, measured, accepted, reason: "rejections" (measured class x outcome), "agreement" (prompted x measured)."""
    named = generated.assign(prompted=_named(generated.prompted), measured=_named(generated.measured))
    named["outcome"] = generated.reason.where(~generated.accepted, "accepted")
    classes = [*CLASSES, *(["none"] if "none" in set(named.measured) else [])]
    rejections = pd.crosstab(named.measured, named.outcome, dropna=False).reindex(classes, fill_value=0)
    rejections = rejections[["accepted"] * ("accepted" in rejections) + sorted(rejections.columns.drop("accepted", errors="ignore"))]
    agreement = pd.crosstab(named.prompted, named.measured, dropna=False).reindex(index=CLASSES, columns=classes, fill_value=0)
    found = {"rejections": rejections.rename_axis("measured class"), "agreement": agreement.rename_axis("prompted class")}
    return {name: table.rename_axis(columns=None).reset_index() for name, table in found.items()}


def generated_by_index(generated: pd.DataFrame, view: View) -> pd.DataFrame:
    """Generated images' index and accepted by bins [low, high) of the view's width -> low, high, produced, accepted, rising and without gaps.

    Images outside the view's plausible range, or without a finite index, are in no bin: no index says where they would belong.
    """
    low, high = view.plausible
    inside = generated[generated["index"].between(low, high)]
    number = np.floor(inside["index"] / view.bin_width + 1e-9).astype(int)  # 0.42 / 0.02 is a little less than 21
    bins = np.arange(number.min(), number.max() + 1) if len(number) else np.arange(0)
    counts = [number[chosen].value_counts().reindex(bins, fill_value=0).to_numpy() for chosen in (slice(None), inside.accepted)]
    edges = (np.append(bins, bins[-1:] + 1) * view.bin_width).round(9)
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "produced": counts[0], "accepted": counts[1]})


def ranked_prompts(rows: list[dict]) -> list[dict]:
    """Prompts with their agreement, accepted (shares) and distance (Fréchet), the best first, each with `rank`: the mean of its three places. A tie goes
    to agreement, then to the one that stood first."""
    table = pd.DataFrame(rows)
    places = pd.DataFrame(
        {"agreement": table.agreement.rank(ascending=False), "accepted": table.accepted.rank(ascending=False), "distance": table.distance.rank()}
    )
    table = table.assign(rank=places.mean(axis=1).round(3)).sort_values(["rank", "agreement"], ascending=[True, False], kind="stable")
    return table.to_dict("records")


def _named(labels: pd.Series) -> pd.Series:
    """Class names; "none" for an image whose points give no index (-1)."""
    return labels.map(lambda label: CLASSES[label] if label >= 0 else "none")

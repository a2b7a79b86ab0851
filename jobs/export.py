"""A run's images with all that is known of them, for other programs (`vhs export`): who trains and who is held out as the run has it, real and generated
told apart."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from jobs import labels, lineage, plan
from jobs.attempt import Inputs
from jobs.batches import network_points, open_rows
from jobs.stages import train
from shards.export import Dataset, export
from shards.storage import open_storage
from vhs.measure import CLASSES

WHAT = {"real": "split", "accepted": "label", "all": "label"}  # -> the stage that must be done
SAID = pa.schema(
    [
        ("split", pa.string()),  # train, valid (the inner validation), test: what the scope does with it
        ("class", pa.string()),
        ("generated", pa.bool_()),
        ("index", pa.float64()),
        ("points", pa.list_(pa.list_(pa.float64()))),  # [K, 2], x right, y down, in the image's pixels
        ("patient", pa.string()),
        ("source", pa.string()),
        ("file", pa.string()),  # of a real image, as its owner knows it; what follows is of generated ones
        ("verdict", pa.string()),  # accepted, or the reason against it
        ("label_source", pa.string()),
        ("spread", pa.float64()),
        ("prompt", pa.string()),
        ("prompted", pa.string()),
        ("number", pa.int64()),
        ("seed", pa.int64()),
        ("generator", pa.string()),
        ("labeller", pa.string()),
    ]
)


def export_run(url: str, layout: str, out: str, what: str, scope: str) -> tuple[dict[str, int], int]:
    """Write the images that `what` names, as `scope` uses them -> (images by split, files written now).

    real: those of the data. accepted: and the generated ones that the arm mixed trains on. all: and every other generated one, labelled so far.
    PlanError for a run that has not come so far, LeakError for a generated image that may not stand beside the held-out ones.
    """
    run = plan.reopen(url, read_only=True)
    run.only_scope = scope
    needed = dict(run.named()).get(WHAT[what])
    if needed is None or not all(map(run.done, needed)):
        raise plan.PlanError(f"{url} has work left before its {what} images of {scope} are known: vhs stage {WHAT[what]} {url}")
    rows = _rows(run, what, scope).sort_values("key", ignore_index=True)  # keys are digests: an order that is shuffled, and the same every time
    about = pa.Table.from_pandas(rows[SAID.names], schema=SAID, preserve_index=False)
    storage = open_storage(out)
    written = export(Dataset(open_rows(run.storage, rows), about, CLASSES), layout, storage, storage.work)
    return rows["split"].value_counts().to_dict(), written


def _rows(run, what: str, scope: str) -> pd.DataFrame:
    """The images with the columns of SAID and those that tell where they are."""
    inputs = Inputs(run.storage, run.unit(train.NAME, scope, train.made_of(run, "real" if what == "real" else "mixed", scope), params={"scope": scope}))
    of_scope = lineage.split_rows(inputs)
    parts = {"train": of_scope.training, "valid": of_scope.inner, "test": of_scope.held_out}
    real = pd.concat([_real(rows, run.config.resolution).assign(split=split) for split, rows in parts.items()], ignore_index=True)
    if what == "real":
        return real.reindex(columns=real.columns.union(SAID.names))
    drawn = train.accepted(run.config, inputs, of_scope)
    if what == "all":
        rest = inputs.samples("generated").merge(labels.of(inputs), on="key", validate="one_to_one")
        drawn = pd.concat([drawn, rest[~rest.key.isin(drawn.key)]], ignore_index=True)
    return pd.concat([real, _generated(drawn)], ignore_index=True)


def _real(rows: pd.DataFrame, resolution: int) -> pd.DataFrame:
    known = rows.points.notna().to_numpy()
    points = pd.Series(None, index=rows.index, dtype=object)
    points[known] = pd.Series(list(network_points(rows[known], resolution).tolist()), index=rows.index[known], dtype=object) if known.any() else None
    return rows.assign(**{"class": _classes(rows)}, generated=False, file=rows.origin, points=points)


def _generated(rows: pd.DataFrame) -> pd.DataFrame:
    points = [None if flat is None else [[float(x), float(y)] for x, y in zip(flat[::2], flat[1::2], strict=True)] for flat in rows.points]
    verdict = rows.reason.where(~rows.accepted, "accepted")
    return rows.assign(**{"class": _classes(rows)}, split="train", generated=True, verdict=verdict, points=points, file=None, patient=None)


def _classes(rows: pd.DataFrame) -> pd.Series:
    return rows.label.map(dict(enumerate(CLASSES)))

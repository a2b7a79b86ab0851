"""A person's word on generated images: labels out as a table, corrections in (`vhs labels RUN export|import FILE`).

A labels shard is never rewritten. What an import changes is committed once, a table for each generator and scope whose images it names, numbered by the
import: labels/corrections/<scope>/00003-….parquet is of the fourth. Of several words on one image the last counts. Training and report read those tables,
so the next `vhs run` redoes what they touch and nothing else. Rounds that were listed stay as they were; whether another is needed is counted with the
corrections.

Looking is worth remembering too: what a person looked at and left as it was stands in labels/confirmed/. No unit reads it, so nothing is made again; an
export of the most uncertain labels does, and asks about others.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from jobs.generators import DREAMBOOTH, KNOWING, made_by, place
from jobs.plan import CONFIRMED, CORRECTIONS
from jobs.unit import Unit
from shards import manifest
from shards.storage import Storage
from vhs.measure import CLASSES, View

COLUMNS = ("points", "index", "label", "accepted", "reason", "label_source")  # of a labels table, that a correction replaces
WORDS = {"yes": True, "true": True, "1": True, "accept": True, "no": False, "false": False, "0": False, "reject": False}
SHOWN = 10  # faulty rows an error names


class LabelError(ValueError):
    """A table of labels that cannot be taken; the message lists its faulty rows. Nothing was imported."""


def tables(run, scope: str, generator: str = DREAMBOOTH) -> list[str]:
    """The tables of corrections of what a generator made for a scope, the oldest first."""
    return run.under(folder(scope, generator))


def folder(scope: str, generator: str) -> str:
    """Where they lie."""
    return f"{CORRECTIONS}/{place(generator, scope)}/"


def number(path: str) -> int:
    """Of the import, from 1, that brought the table at `path`."""
    return 1 + int(path.rpartition("/")[2].partition("-")[0])


def read(storage: Storage, paths: Iterable[str]) -> pd.DataFrame:
    """The rows of the tables at `paths`, in order."""
    found = [manifest.read(storage, path).to_pandas() for path in paths]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["key", *COLUMNS])


def corrected(labels: pd.DataFrame, corrections: pd.DataFrame) -> pd.DataFrame:
    """`labels` (key, COLUMNS, ...) with what the rows of `corrections`, in order, say of the same keys."""
    if not len(corrections):
        return labels
    last = corrections.drop_duplicates("key", keep="last").set_index("key")
    rows = labels.key.isin(last.index).to_numpy()
    labels = labels.copy()
    for name in COLUMNS:
        column = labels[name].to_numpy(dtype=object, copy=True)
        column[rows] = last.loc[labels.key[rows], name].to_numpy(dtype=object)
        labels[name] = pd.Series(column, index=labels.index, dtype=object if name == "points" else labels[name].dtype)
    return labels


def of(inputs) -> pd.DataFrame:
    """The labels that a unit reads (its roles `labels` and, if a person spoke, `corrections`), as corrected."""
    return corrected(inputs.table("labels"), inputs.table("corrections"))


def accepted(run, unit: Unit) -> dict[str, int]:
    """Accepted images of each class in a finished unit of labels, as corrected."""
    if not (said := tables(run, unit.params["scope"], made_by(unit.params))):
        return run.marker(unit.marker).facts["accepted"]
    rows = corrected(read(run.storage, [unit.marker]), read(run.storage, said))
    return {name: int((rows.accepted & (rows.label == number)).sum()) for number, name in enumerate(CLASSES)}


def judged(run, units: list[Unit]) -> bool:
    """Whether a person has said something of any image of these finished units of labels."""
    said = [path for scope, generator in {(unit.params["scope"], made_by(unit.params)) for unit in units} for path in tables(run, scope, generator)]
    return bool(said) and bool(set(read(run.storage, said).key) & set(read(run.storage, [unit.marker for unit in units]).key))


def table(run) -> pd.DataFrame:
    """Every generated image labelled so far, with its label as corrected, `made_by` (its generator's name) and `looked_at` (bool: by a person); of controls
    only those whose class is not known."""
    named, parts = dict(run.named()), {}
    for unit in (unit for unit in named.get("label", []) if run.done(unit) and made_by(unit.params) not in KNOWING):
        parts.setdefault((unit.params["scope"], made_by(unit.params)), []).append(unit)
    if not parts:
        raise LabelError(f"{run.url} has no labelled images yet: vhs status {run.url}")
    found = []
    for (scope, generator), units in parts.items():
        images = manifest.load(run.storage, paths=[unit.inputs["shard"][0][0] for unit in units]).to_pandas()
        rows = images.merge(read(run.storage, [unit.marker for unit in units]), on="key", validate="one_to_one")
        rows = corrected(rows, read(run.storage, tables(run, scope, generator)))
        found.append(rows.assign(made_by=generator))
    rows = pd.concat(found, ignore_index=True)
    confirmed = read(run.storage, run.under(f"{CONFIRMED}/")).key
    return rows.assign(looked_at=(rows.label_source == "hand") | rows.key.isin(confirmed))


def most_uncertain(rows: pd.DataFrame, view: View, count: int) -> pd.DataFrame:
    """The `count` images of `rows` whose class a person's look is worth most for: the measured index lies fewest spreads from a class edge, and nobody
    has looked at them yet. Uncertainty sampling (Lewis & Gale, SIGIR 1994), with the margin in units of the measurement's own error."""
    index, spread = rows["index"].to_numpy(float), rows.spread.to_numpy(float)
    margin = np.abs(index[:, None] - np.asarray(view.edges)).min(1) / np.maximum(spread, 1e-9)
    margin[~np.isfinite(margin) | rows.looked_at.to_numpy(bool)] = np.inf
    order = np.lexsort((rows.key, margin))[:count]
    return rows.iloc[order[np.isfinite(margin[order])]].reset_index(drop=True)


def export(run, file: Path, images: Path | None = None, uncertain: int | None = None, generator: str | None = None) -> int:
    """Writes the labels to `file` (.csv or .mat), of all images or of `generator`'s alone, and of these all or the `uncertain` most_uncertain; and to
    `images` the pictures as <key>.png -> how many.

    Where nobody says whose, the most uncertain are those of the run's own generator, if it has one: what mixed trains on.
    """
    rows, view = table(run), run.config.measure
    there = rows.made_by.unique().tolist()
    if generator and generator not in there:
        raise LabelError(f"{run.url} has labelled no images of the generator {generator!r}; there are those of {', '.join(there)}")
    if generator or (uncertain and DREAMBOOTH in there):
        rows = rows[rows.made_by == (generator or DREAMBOOTH)].reset_index(drop=True)
    if uncertain:
        rows = most_uncertain(rows, view, uncertain).assign(looked_at=True)  # by whoever hands them back
    plain = {
        "key": rows.key,
        "generator": rows.made_by,
        "scope": rows.generated_for,
        "shard": rows.path,
        "prompt": rows.prompt,
        "prompted": rows.prompted,
        "source": rows.source,
        "index": rows["index"].round(4),
        "spread": rows.spread.round(4),
        "label": [CLASSES[n] if n >= 0 else "" for n in rows.label],
        "accepted": np.where(_unjudged(run, rows), "", np.where(rows.accepted, "yes", "no")),
        "looked_at": np.where(rows.looked_at, "yes", ""),
        "reason": rows.reason,
        "label_source": rows.label_source,
        "near_key": rows.near_key,
        "near_distance": rows.near_distance.round(4),
    }
    points = np.array(rows.points.to_list(), np.float64).reshape(len(rows), len(view.points), 2).round(3)
    if _format(file) == ".mat":
        from scipy.io import savemat

        fields = {name: np.array(pd.Series(values).fillna("").to_list(), object) if _text(values) else values for name, values in plain.items()}
        savemat(file, {"labels": fields | {"points": points}})
    else:
        flat = points.reshape(len(rows), 2 * len(view.points))
        pd.DataFrame(plain | {name: flat[:, n] for n, name in enumerate(_point_columns(view))}).to_csv(file, index=False)
    if images:
        _write_images(run, rows, images)
    return len(rows)


def _write_images(run, rows: pd.DataFrame, folder: Path):
    from jobs.batches import load_images
    from vhs.radiograph import encode_png

    folder.mkdir(parents=True, exist_ok=True)
    for key, image in zip(rows.key, load_images(run.storage, rows) if len(rows) else ()):
        (folder / f"{key}.png").write_bytes(encode_png(image))


def _unjudged(run, rows: pd.DataFrame) -> pd.Series:
    """Which images wait for a person's yes or no: with label_by hand all that none has spoken of."""
    return (rows.label_source != "hand") & (run.config.label_by == "hand")


def _format(file: Path) -> str:
    if file.suffix not in (".csv", ".mat"):
        raise LabelError(f"{file}: labels are a .csv or a .mat file")
    return file.suffix


def _text(values) -> bool:
    return not pd.api.types.is_numeric_dtype(pd.Series(values).dtype)


def _point_columns(view: View) -> list[str]:
    return [f"{name}_{axis}" for name in view.points for axis in "xy"]


@dataclass(frozen=True)
class Taken:
    """What an import did: images corrected, and images that a person looked at for the first time and left as they were."""

    corrected: int
    confirmed: int


def take(run, file: Path) -> Taken:
    """Commits what `file` says otherwise than the run, and what in it was looked at. LabelError listing the faulty rows, and then nothing is imported.

    A row names its `key` and any of `accepted` (yes, no), `label` (a class) and all points; what is empty or absent is left as it is. Points decide
    the class. A row that leaves everything as it is confirms it if `looked_at` says yes: a file handed back whole must not count as looked at.
    """
    now, view = table(run).set_index("key"), run.config.measure
    unjudged = _unjudged(run, now)
    rows = _csv_rows(file) if _format(file) == ".csv" else _mat_rows(file, view)
    changes, confirmed, faults, seen = [], [], [], set()
    for line, row in enumerate(rows, start=2 if file.suffix == ".csv" else 1):
        try:
            key = (row.get("key") or "").strip()
            if key not in now.index:
                raise LabelError(f"no labelled image has the key {key!r}")
            if key in seen:
                raise LabelError(f"the key {key} comes twice")
            seen.add(key)
            looked = _yes_or_no(row, "looked_at")
            if change := _change(row, now.loc[key], view, run.config.resolution, unjudged[key]):
                changes.append(_whose(now.loc[key]) | {"key": key, **change})
            elif looked and not unjudged[key] and not now.looked_at[key]:
                confirmed.append(_whose(now.loc[key]) | {"key": key})
        except LabelError as fault:
            faults.append(f"row {line}: {fault}")
    if faults:
        more = f"\nand {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise LabelError(f"{file}: {len(faults)} faulty rows, nothing was imported\n" + "\n".join(faults[:SHOWN]) + more)
    _commit(run, CONFIRMED, confirmed, pa.schema([("key", pa.string())]))
    _commit(run, CORRECTIONS, changes, _schema())
    return Taken(len(changes), len(confirmed))


def _whose(now: pd.Series) -> dict[str, str]:
    return {"scope": now.generated_for, "generator": now.made_by}


def _commit(run, above: str, rows: list[dict], schema: pa.Schema):
    """The rows of one import, a table for each generator and scope, all with the number after the last one's below `above`."""
    before = max(map(number, run.under(f"{above}/")), default=0)
    for scope, generator in sorted({(row["scope"], row["generator"]) for row in rows}):
        part = [row for row in rows if (row["scope"], row["generator"]) == (scope, generator)]
        data = manifest.encode(pa.Table.from_pylist(part, schema=schema), {"facts": "{}"})
        run.storage.commit(f"{above}/{place(generator, scope)}/{before:05d}-{hashlib.sha256(data).hexdigest()[:12]}.parquet", data)


def _schema() -> pa.Schema:
    kinds = [pa.list_(pa.float32()), pa.float64(), pa.int64(), pa.bool_(), pa.string(), pa.string()]
    return pa.schema([("key", pa.string()), *zip(COLUMNS, kinds)])


def _change(row: dict, now: pd.Series, view: View, side_px: int, unjudged: bool) -> dict | None:
    """The COLUMNS of an image as `row` has them, or None if that is as they are; any word on an `unjudged` image is one. LabelError for what cannot be
    meant."""
    points, index, label, ok = np.asarray(now.points, np.float64), float(now["index"]), int(now.label), bool(now.accepted)
    given = _points(row, view, side_px)
    if given is not None and not np.allclose(given, points, atol=6e-4):
        points, index = given, float(view.measure(given.reshape(-1, 2)))
        if not np.isfinite(index):
            raise LabelError(f"{view.index} cannot be measured: two key points coincide")
        label = int(view.classify(index))
    elif word := (row.get("label") or "").strip().lower():
        if word not in CLASSES:
            raise LabelError(f"label {word!r}; legal: {', '.join(CLASSES)}")
        label = CLASSES.index(word)
    judged = _yes_or_no(row, "accepted")
    ok = ok if judged is None else judged
    if ok and label < 0:
        raise LabelError("accepted, but it has neither a label nor points that can be measured")
    same = (label, ok) == (int(now.label), bool(now.accepted)) and np.array_equal(points, np.asarray(now.points, np.float64))
    if same and not (unjudged and judged is not None):
        return None
    reason = "" if ok else (now.reason if not now.accepted and not unjudged else "rejected by hand")
    return dict(zip(COLUMNS, (points.astype(np.float32).tolist(), index, label, ok, reason, "hand")))


def _yes_or_no(row: dict, name: str) -> bool | None:
    """What `row` says there; None where it says nothing."""
    if not (word := (row.get(name) or "").strip().lower()):
        return None
    if word not in WORDS:
        raise LabelError(f"{name} {word!r}; legal: {', '.join(WORDS)}")
    return WORDS[word]


def _points(row: dict, view: View, side_px: int) -> np.ndarray | None:
    """The row's points [2K] in the image's pixels, or None where it gives none."""
    names = _point_columns(view)
    given = [str(row.get(name) or "").strip() for name in names]
    if not any(given):
        return None
    if missing := [name for name, text in zip(names, given) if not text]:
        raise LabelError(f"{len(names) - len(missing)} of {len(names)} coordinates, without {', '.join(missing)}: give all or none")
    try:
        points = np.array(given, np.float64)
    except ValueError:
        raise LabelError(f"a point that is not a number among {', '.join(given)}") from None
    if not np.isfinite(points).all():
        raise LabelError("a point that is not a number")
    if (points < -0.5).any() or (points > side_px - 0.5).any():
        raise LabelError(f"a point outside the image of {side_px} x {side_px} pixels")
    return points


def _mat_labels(data: bytes):
    """The variable `labels` of a .mat file, or None. ValueError for a damaged one, NotImplementedError for one of MATLAB 7.3."""
    from scipy.io import loadmat

    try:
        return loadmat(io.BytesIO(data), variable_names=("labels",), simplify_cells=True).get("labels")
    except NotImplementedError:
        raise
    except Exception as error:  # as in vhs/sources/annotation.py: damaged bytes raise whatever they meet
        raise ValueError(f"{error.__class__.__name__}: {error}") from None


def _csv_rows(file: Path) -> list[dict]:
    try:
        return list(csv.DictReader(file.open(newline="", encoding="utf-8-sig")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise LabelError(f"{file} is no table in UTF-8: {error}. Save it as CSV (UTF-8)") from None


def _mat_rows(file: Path, view: View) -> list[dict]:
    """The struct `labels` as rows of text, as a CSV has them."""
    from vhs.contained import Contained, Died

    try:
        with Contained() as contained:
            labels = contained.call(_mat_labels, file.read_bytes())
    except (ValueError, NotImplementedError, Died) as error:
        raise LabelError(f"{file} cannot be read as a .mat file: {error}. Save it with -v7, or as .csv") from None
    if not isinstance(labels, dict) or "key" not in labels:
        raise LabelError(f"{file}: holds no struct `labels` with the field `key`")
    keys = np.atleast_1d(labels["key"])
    fields = {name: np.atleast_1d(labels[name]) for name in ("key", "accepted", "label", "looked_at") if name in labels}
    if "points" in labels:
        try:
            points = np.asarray(labels["points"], np.float64)
        except (ValueError, TypeError):
            raise LabelError(f"{file}: labels.points holds something else than numbers") from None
        points = points[None] if points.ndim == 2 and len(keys) == 1 else points
        if points.shape != (len(keys), len(view.points), 2):
            raise LabelError(f"{file}: labels.points has the shape {points.shape}, legal is {(len(keys), len(view.points), 2)}")
        fields |= dict(zip(_point_columns(view), points.reshape(len(keys), -1).T))
    if uneven := [name for name, values in fields.items() if len(values) != len(keys)]:
        raise LabelError(f"{file}: labels.{uneven[0]} has {len(fields[uneven[0]])} entries for {len(keys)} keys")
    return [{name: str(values[n]) if np.size(values[n]) else "" for name, values in fields.items()} for n in range(len(keys))]  # a cell without text is 0 x 0

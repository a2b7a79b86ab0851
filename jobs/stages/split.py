"""split: who trains and who is held out, for every scope, drawn once (vhs/split.py has the rules)."""

from __future__ import annotations

from jobs.unit import Table, Unit

NAME, FOLDER, KIND, TORCH = "split", "splits", "parquet", False
SCIENCE = ("split",)
AFTER = ("ingest",)


def units(run) -> list[Unit]:
    return [run.unit(NAME, FOLDER, {"real": run.committed("ingest")})]


def work(config, inputs, output) -> Table:
    import pyarrow as pa

    from vhs.split import counts, drop_copies, make_split, patients_known, scopes

    images, rejects = drop_copies(inputs.samples("real"), config.split)
    splits = make_split(images, config.split)
    sizes = {scope: counts(splits, scope).to_dict("records") for scope in scopes(config.split)}
    facts = {"patients_known": patients_known(splits), "groups": int(splits.patient.nunique()), "counts": sizes, "rejects": rejects}
    return Table(pa.Table.from_pandas(splits, preserve_index=False), facts)

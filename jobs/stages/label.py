"""label: what every generated image is taken for. It is measured whatever `label_by` says; that decides which word becomes its training label.

measure   the class of its measured index, if no verdict speaks against it      (the prompted class stays a column)
prompt    the prompted class                                                     both unless the image copies a training image
teacher   the class that a classifier of the scope's real training images sees, where it is sure enough
hand      its measured class, once a person accepts it: vhs labels RUN export, import

Copies of training images and fresh phantoms (jobs/generators.py) are what they are: their class is known, and no verdict is asked.
"""

from __future__ import annotations

from jobs.unit import Table, Unit

NAME, FOLDER, KIND, TORCH = "label", "labels", "parquet", True
SCIENCE = ("view", "edges", "high_is_large", "threads", "labeller.passes", "label_by")
AFTER = ("labeller", "generate")
SOURCES = {"measure": "machine", "hand": "machine", "prompt": "prompt", "teacher": "teacher", "known": "known"}  # -> label_source, unless a person speaks


def units(run) -> list[Unit]:
    return [unit(run, shard) for shard in run.units("generate") if run.done(shard)]


def unit(run, shard: Unit) -> Unit:
    """The unit that labels the generated shard of `shard`."""
    inputs = {"shard": [shard.marker], "labeller": run.committed("labeller", scope=shard.params["scope"])}
    params = {name: value for name, value in shard.params.items() if name != "sources"}  # files of which its images were made
    return run.unit(NAME, shard.path.replace("generated/", f"{FOLDER}/", 1), inputs, params=params)


def work(config, inputs, output) -> Table:
    import numpy as np
    import pyarrow as pa

    from jobs import batches, generators, world
    from vhs.labelling import Labeller
    from vhs.measure import CLASSES

    rows, by = inputs.samples("shard"), "known" if generators.made_by(inputs.params) in generators.KNOWING else config.label_by
    if rows.empty:  # of a set outside of the run, where a whole unit cannot be read
        return Table(_schema().empty_table(), {"images": 0, "accepted": dict.fromkeys(CLASSES, 0)})
    labeller = Labeller.load(inputs.folder("labeller")).to(world.device(config.execution.device))
    measured = labeller.measure(batches.load_images(inputs.storage, rows), rows.key.tolist(), passes=config.labeller.passes)
    label, reasons = _decided(by, config, inputs, rows, labeller, measured)
    accepted = (label >= 0) & np.array([not reason for reason in reasons])
    near_key, near_distance = labeller.copies.nearest(measured) if labeller.copies else ([None] * len(rows), np.full(len(rows), np.nan))
    table = pa.table(
        {
            "key": rows.key.tolist(),
            "points": list(measured.points.reshape(len(rows), -1).astype(np.float32)),
            "index": measured.index,
            "spread": measured.spread,
            "label": label,
            "accepted": accepted,
            "reason": reasons,
            "label_source": [SOURCES[by]] * len(rows),
            "labeller": [inputs.markers("labeller")[0].path] * len(rows),
            "near_key": near_key,
            "near_distance": near_distance,
        },
        schema=_schema(),
    )
    counts = {name: int((accepted & (label == number)).sum()) for number, name in enumerate(CLASSES)}
    return Table(table, {"images": len(rows), "accepted": counts})


def _schema():
    """The columns of a shard's labels."""
    import pyarrow as pa

    word, number = pa.string(), pa.float64()
    return pa.schema({
        "key": word, "points": pa.list_(pa.float32()), "index": number, "spread": number, "label": pa.int64(), "accepted": pa.bool_(), "reason": word,
        "label_source": word, "labeller": word, "near_key": word, "near_distance": number,
    })  # fmt: skip


def _decided(by: str, config, inputs, rows, labeller, measured):
    """Label int64 [N] (-1: none) and the reason against accepting each image, "" where there is none."""
    import numpy as np

    from jobs import teacher

    finite = np.isfinite(measured.index)
    seen = np.where(finite, config.measure.classify(np.where(finite, measured.index, 0)), -1)
    verdicts = [reason for _, reason in labeller.verdict(measured)]
    if by == "known":
        return _prompted(rows), [""] * len(rows)
    if by == "measure":
        return seen, verdicts
    if by == "hand":
        return seen, [reason or "not yet judged by a person" for reason in verdicts]
    copies = ["near-copy" if copied else "" for copied in labeller.copied(measured)]
    if by == "prompt":
        return _prompted(rows), copies
    said, sure = teacher.answers(config, inputs, rows)
    return said, [reason or ("" if ok else "teacher unsure") for reason, ok in zip(copies, sure)]


def _prompted(rows):
    from vhs.measure import CLASSES

    return rows.prompted.map(CLASSES.index).to_numpy()

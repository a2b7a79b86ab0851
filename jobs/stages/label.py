"""label: every generated image measured by its scope's labeller. The training label is the measured class; the prompted class stays a column."""

from __future__ import annotations

from jobs.unit import Table, Unit

NAME, FOLDER, KIND, TORCH = "label", "labels", "parquet", True
SCIENCE = ("view", "edges", "high_is_large", "threads", "labeller.passes")
AFTER = ("labeller", "generate")


def units(run) -> list[Unit]:
    return [unit(run, shard) for shard in run.units("generate") if run.done(shard)]


def unit(run, shard: Unit) -> Unit:
    """The unit that labels the generated shard of `shard`."""
    inputs = {"shard": [shard.marker], "labeller": run.committed("labeller", scope=shard.params["scope"])}
    return run.unit(NAME, shard.path.replace("generated/", f"{FOLDER}/", 1), inputs, params=shard.params)


def work(config, inputs, output) -> Table:
    import numpy as np
    import pyarrow as pa

    from jobs import batches, world
    from vhs.labelling import Labeller, verdict
    from vhs.measure import CLASSES

    rows, view = inputs.samples("shard"), config.measure
    labeller = Labeller.load(inputs.folder("labeller")).to(world.device(config.execution.device))
    measured = labeller.measure(batches.load_images(inputs.storage, rows), rows.key.tolist(), passes=config.labeller.passes)
    verdicts = verdict(measured, labeller.thresholds, view)
    finite = np.isfinite(measured.index)
    label = np.where(finite, view.classify(np.where(finite, measured.index, 0)), -1)
    accepted = np.array([ok for ok, _ in verdicts]) & finite
    table = pa.table(
        {
            "key": rows.key.tolist(),
            "points": list(measured.points.reshape(len(rows), -1).astype(np.float32)),
            "index": measured.index,
            "spread": measured.spread,
            "label": label,
            "accepted": accepted,
            "reason": [reason for _, reason in verdicts],
            "label_source": ["machine"] * len(rows),
            "labeller": [inputs.markers("labeller")[0].path] * len(rows),
        }
    )
    counts = {name: int((accepted & (label == number)).sum()) for number, name in enumerate(CLASSES)}
    return Table(table, {"images": len(rows), "accepted": counts})

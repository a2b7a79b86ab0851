"""evaluate: each arm's word on every held-out image of a scope and on every image of its inner validation, once. No augmentation.

The column `role` tells them apart: figures and verdict rest on "held-out" alone; "validation" is what schedules and thresholds looked at
(a set's own valid split, where it has one), shown beside. Two arms train nothing: `measure` is the labeller's index cut at
the edges, `source` looks at no image.
"""

from __future__ import annotations

from jobs.unit import Table, Unit
from vhs.arms import UNTRAINED

NAME, FOLDER, KIND, TORCH = "evaluate", "predictions", "parquet", True
SCIENCE = ("view", "resolution", "threads", "edges", "high_is_large", "labeller.passes")
AFTER = ("ingest", "split", "labeller", "train")


def units(run) -> list[Unit]:
    real = {"real": run.committed("ingest"), "splits": run.committed("split")}
    made = []
    for scope in run.scopes:
        for arm in (arm for arm in UNTRAINED if arm in run.config.arms):
            inputs = real | ({"labeller": run.committed("labeller", scope=scope)} if arm == "measure" else {})
            made.append(run.unit(NAME, f"{FOLDER}/{arm}/{scope}", inputs, params={"arm": arm, "scope": scope}))
        for trained in (unit for unit in run.units("train") if unit.params["scope"] == scope):
            arm, seed = trained.params["arm"], trained.params["seed"]
            made.append(
                run.unit(
                    NAME,
                    f"{FOLDER}/{arm}/{scope}/seed-{seed}",
                    real | {"classifier": [trained.marker]},
                    params=trained.params,
                    ranks=trained.ranks,
                )
            )
    return made


def work(config, inputs, output) -> Table:
    import pandas as pd
    import pyarrow as pa

    from jobs import lineage
    from vhs.metrics import NO_SEED

    params, scope = inputs.params, lineage.split_rows(inputs)
    roles = [scope.held_out.assign(role="held-out"), scope.inner.assign(role="validation")]
    rows = pd.concat(roles).sort_values("key", ignore_index=True)
    if params["arm"] == "measure":
        lineage.guard_labeller(inputs.markers("labeller")[0], scope)
    table = rows[["key", "role", "patient", "source", "label", "index", "points", "origin"]].assign(
        arm=params["arm"], scope=params["scope"], seed=params.get("seed", NO_SEED)
    )
    how = {"measure": _measured, "source": _by_source}.get(params["arm"], _classified)
    answers = how(config, inputs, rows)
    return Table(pa.Table.from_pandas(table.merge(answers, on="key", validate="one_to_one"), preserve_index=False))


def _classified(config, inputs, rows):
    import numpy as np
    import pandas as pd

    from jobs import batches, world
    from vhs.measure import CLASSES
    from vhs.networks import load_classifier
    from vhs.training import predict

    epochs = batches.Epochs(inputs.storage, rows, config.classifier.batch, lambda epoch: np.arange(len(rows)))
    model, settings = load_classifier(inputs.folder("classifier"))
    found = predict(model, epochs(0, 0), world.accelerator(config.execution.device), size_px=settings.size_px)
    probability = found["probability"]
    return pd.DataFrame(
        {"key": found["key"], "predicted": probability.argmax(1), **{f"p_{name}": probability[:, i] for i, name in enumerate(CLASSES)}}
    )


def _by_source(config, inputs, rows):
    """For each image the classes' shares among the scope's training images of its source; of all of them, for a source that nobody trained on."""
    import pandas as pd

    from jobs import lineage
    from vhs.measure import CLASSES

    training = lineage.split_rows(inputs).training
    shares = pd.crosstab(training.source, training.label, normalize="index").reindex(columns=range(len(CLASSES)), fill_value=0.0)
    everywhere = training.label.value_counts(normalize=True).reindex(range(len(CLASSES)), fill_value=0.0)
    of_each = pd.DataFrame([shares.loc[source] if source in shares.index else everywhere for source in rows.source]).to_numpy()
    return pd.DataFrame(
        {"key": rows.key, "predicted": of_each.argmax(1), **{f"p_{name}": of_each[:, n] for n, name in enumerate(CLASSES)}}
    )


def _measured(config, inputs, rows):
    import numpy as np
    import pandas as pd

    from jobs import batches, world
    from vhs.labelling import Labeller
    from vhs.measure import CLASSES

    labeller = Labeller.load(inputs.folder("labeller")).to(world.device(config.execution.device))
    found = labeller.measure(batches.load_images(inputs.storage, rows), rows.key.tolist(), passes=config.labeller.passes)
    known = np.isfinite(found.index)  # points that coincide measure nothing; the arm still answers, and such an answer is no measurement error
    predicted = config.measure.classify(np.where(known, found.index, 0.0))
    certain = np.eye(len(CLASSES))[predicted]
    return pd.DataFrame(
        {
            "key": rows.key,
            "predicted": predicted,
            "measured": np.where(known, found.index, np.nan),
            "spread": found.spread,
            "measured_points": list(found.points.reshape(len(rows), -1)),
            **{f"p_{name}": certain[:, i] for i, name in enumerate(CLASSES)},
        }
    )

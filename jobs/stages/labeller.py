"""labeller: the key-point network of a scope, fine-tuned on that scope's training images; its verdict thresholds are fitted on them and
on the scope's inner validation.

It records the keys and patients it saw: the leak guard (jobs/lineage.py) holds generated images it labelled against them.
"""

from __future__ import annotations

from jobs.unit import Files, Unit

NAME, FOLDER, KIND, TORCH = "labeller", "labeller", "json", True
SCIENCE = ("view", "resolution", "threads", "edges", "high_is_large", "labeller")
AFTER = ("ingest", "split")


def units(run) -> list[Unit]:
    from jobs import models, teacher

    inputs, init = {"real": run.committed("ingest"), "splits": run.committed("split")}, models.fingerprint(models.labeller(run.config))
    # only a run with a teacher has its labellers depend on the classifier's settings
    taught = {}
    if run.config.label_by == "teacher":
        taught["teacher"] = {"classifier": teacher.science(run.science(("classifier",))["classifier"])} | models.classifier(run.config)
    return [
        run.unit(NAME, f"{FOLDER}/{scope}", inputs, params={"scope": scope, "init": init, **taught}, ranks=run.config.labeller.ranks)
        for scope in run.scopes
    ]


def work(config, inputs, output) -> Files:
    import json
    from dataclasses import replace

    import numpy as np
    import pandas as pd

    from jobs import batches, lineage, models, teacher, world
    from vhs.curve import Curve
    from vhs.labelling import Labeller
    from vhs.schooling import fine_tune
    from vhs.verdict import Copies, fit_thresholds

    settings, view, real = config.labeller, config.measure, lineage.split_rows(inputs)
    pointed = real.training[real.training.points.notna()].reset_index(drop=True)
    models.check_labeller(config)
    if settings.init == "scratch":
        labeller = Labeller.scratch(view, settings)
    else:
        labeller = replace(Labeller.load(models.labeller(config)), dropout=settings.dropout)
    steps = settings.steps if len(pointed) else 0
    if steps:
        accelerator = world.accelerator(config.execution.device)
        epochs = batches.Epochs(
            inputs.storage, pointed, settings.batch, batches.shuffled(len(pointed), settings.seed), points_at=config.resolution, pair_last=True
        )
        curve = Curve(steps)
        labeller = fine_tune(
            labeller,
            epochs,
            settings,
            steps_per_epoch=epochs.steps,
            accelerator=accelerator,
            progress=teacher.Phase(output.progress, "key points"),
            curve=curve,
        )
        curve.save(output.folder)
    known = pd.concat([real.training, real.inner], ignore_index=True)
    measured = labeller.measure(batches.load_images(inputs.storage, known), known.key.tolist(), passes=settings.passes)
    unseen = np.arange(len(known)) >= len(real.training)
    error = np.abs(measured.index - known["index"])[unseen]
    replace(
        labeller,
        thresholds=fit_thresholds(measured, settings.keep_quantile, settings.slack, unseen),
        copies=Copies.fit(measured, known.key.tolist(), known.patient.tolist()),
    ).save(output.folder)
    taught = {"teacher_confidence": teacher.train(config, inputs, output, real, after=steps)} if config.label_by == "teacher" else {}
    began = [models.labeller(config), *([models.here(config.classifier.weights)] if taught else [])]
    seen = lineage.seen(known, *map(models.seen, began))
    (output.folder / "lineage.json").write_text(json.dumps(seen, indent=1))
    return Files(
        {
            "scope": inputs.params["scope"],
            "fine_tuned_on": len(pointed) if steps else 0,
            "inner_images": len(real.inner),
            "inner_index_mae": None if error.isna().all() else float(error.mean()),
            **taught,
            **seen,
        }
    )

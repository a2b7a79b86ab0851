"""report: every prediction joined once, the verdict with its interval, and what it rests on, as one page and summary.json."""

from __future__ import annotations

from jobs.unit import Files, Unit

NAME, FOLDER, KIND, TORCH = "report", "report", "json", False
SCIENCE = ("name", "view", "edges", "high_is_large", "resolution", "arms", "seeds", "generation.quota", "data", "phantoms.style")
AFTER = ("ingest", "split", "labeller", "generate", "label", "train", "evaluate")
SHOWN = 4  # images of each class on a contact sheet


def units(run) -> list[Unit]:
    roles = {
        "real": "ingest",
        "splits": "split",
        "generated": "generate",
        "labels": "label",
        "classifiers": "train",
        "predictions": "evaluate",
    }
    return [run.unit(NAME, FOLDER, {role: run.committed(stage) for role, stage in roles.items()}, params={"analysis": run.analysis})]


def work(config, inputs, output) -> Files:
    import json

    import pandas as pd

    from shards import crash
    from vhs import metrics
    from vhs.measure import CLASSES
    from vhs.report import forest, labeller_scatter, render

    view, predictions = config.measure, _predictions(inputs)
    tested = predictions[predictions.scope == "split"]
    measured = tested[tested.arm == "measure"]
    generated = _generated(inputs)
    summary = metrics.summary(
        predictions,
        labeller=metrics.labeller_quality(measured, view) if len(measured) else None,
        generated=metrics.generated_counts(generated, asked=config.generation.quota * len(CLASSES)),
    )
    if "split" in _unmixed(inputs):
        summary["paired"] = None
    (output.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    crash.window("report-half-written")
    tables = metrics.tables(tested, view) | {
        "splits": pd.DataFrame(inputs.facts("splits")["counts"]["split"], columns=["source", "class", "training", "inner", "held_out"])
    }
    figures = {"forest": forest(summary), "real": _sheet(config, inputs, inputs.samples("real"), real=True)}
    if len(measured):
        figures["labeller"] = labeller_scatter(measured, view)
    tables |= metrics.generated_tables(generated)
    figures["generated"] = _sheet(config, inputs, generated, real=False)
    page = render(summary, tables, figures, _notes(config, inputs))
    (output.folder / "index.html").write_text(page, encoding="utf-8")
    return Files({"verdict": metrics.verdict(summary["paired"])})


def _predictions(inputs):
    """Every arm's predictions of every scope on held-out images, each checked to answer each image once."""
    import pandas as pd

    from vhs import metrics, split

    splits, predictions = inputs.table("splits"), inputs.table("predictions")
    predictions = predictions[predictions.role == "held-out"]
    scopes = predictions.groupby("scope", sort=False)
    return pd.concat([metrics.joined_once(rows, split.held_out(splits, scope)) for scope, rows in scopes], ignore_index=True)


def _generated(inputs):
    """The generated images of the test split's scope with their labels."""
    from vhs.measure import CLASSES

    rows = inputs.samples("generated").merge(inputs.table("labels"), on="key", validate="one_to_one")
    rows = rows[rows.generated_for == "split"]
    return rows.assign(prompted=rows.prompted.map(CLASSES.index), measured=rows.label)


def _unmixed(inputs) -> list[str]:
    """Scopes whose mixed arm trained on no generated image."""
    facts = [marker.facts for marker in inputs.markers("classifiers")]
    return sorted({item["scope"] for item in facts if item["arm"] == "mixed" and not item["generated"]})


def _sheet(config, inputs, rows, real: bool) -> bytes:
    """A few images of every class with their key points: true ones on real images, measured ones on generated images (accepted ones first)."""
    import numpy as np

    from jobs import batches
    from vhs.report import contact_sheet, overlay

    view = config.measure
    if not real:
        rows = rows.sort_values("accepted", ascending=False, kind="stable")
    rows = rows[rows.label >= 0].groupby("label").head(SHOWN).sort_values("label", kind="stable", ignore_index=True)
    images = batches.load_images(inputs.storage, rows)
    drawn = []
    for image, row in zip(images, rows.itertuples()):
        if row.points is None:
            drawn.append(image)
            continue
        points = (
            batches.network_points(rows.loc[[row.Index]], config.resolution)[0]
            if real
            else np.asarray(row.points, np.float32).reshape(-1, 2)
        )
        refused = "" if real or row.accepted else f", {row.reason}"
        drawn.append(overlay(image, points, view, f"{view.index} {row.index:.2f}{refused}", scale=max(1, 320 // len(image))))
    return contact_sheet(drawn, SHOWN)


def _notes(config, inputs) -> dict:
    splits, rejects = inputs.facts("splits"), [reject for marker in inputs.markers("real") for reject in marker.facts["rejects"]]
    limits = []
    if config.data == "phantoms":
        limits.append(
            f"The real images of this run are drawn ({config.phantoms.style} phantoms), and the base model was schooled on phantoms of another style: "
            "a gain may be knowledge that leaks from the base."
        )
    if rejects:
        limits.append(f"{len(rejects)} files were not used, the first {rejects[0]['file']}: {rejects[0]['reason']}.")
    if not splits["patients_known"]:
        limits.append("Patients unknown: images of one patient may be on both sides of the split.")
    if unmixed := _unmixed(inputs):
        limits.append(
            f"No generated image was mixed in for {', '.join(unmixed)}: at least one class had none accepted, and then origin would tell "
            "the class. There mixed and real-matched are the same training."
        )
    plan = {
        what.replace("_", " "): ", ".join(map(str, said)) if isinstance(said, list) else said
        for what, said in inputs.params["analysis"].items()
    }
    return {"title": config.name, "plan": plan, "limits": limits, "patients_known": splits["patients_known"]}

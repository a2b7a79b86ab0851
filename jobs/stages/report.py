"""report: every prediction joined once, the verdict with its interval, and what it rests on, as one page, summary.json and evaluators' CSVs.

Images, measurements and curves that the page shows are those of the scope `split`; the folds enter by their predictions.
"""

from __future__ import annotations

import json

from jobs.unit import Files, Unit

NAME, FOLDER, KIND, TORCH = "report", "report", "json", True
SCIENCE = (
    "name", "view", "edges", "high_is_large", "resolution", "threads", "arms", "seeds", "purpose", "generation.quota", "generation.by_source",
    "data", "phantoms.style", "report", "generators",
)  # fmt: skip
AFTER = ("ingest", "split", "labeller", "dreambooth", "generate", "label", "train", "evaluate")


def units(run) -> list[Unit]:
    from jobs import gains, generators, labels, models

    own = {stage: generators.committed(run, stage, generators.DREAMBOOTH, "split") for stage in ("dreambooth", "generate", "label")}
    inputs = {
        "real": run.committed("ingest"),
        "splits": run.committed("split"),
        "labeller": run.committed("labeller", scope="split"),
        "generator": own["dreambooth"],
        "generated": own["generate"],
        "labels": own["label"],
        "prompts": run.committed("prompts", scope="split"),
        "classifiers": run.committed("train"),
        "predictions": run.committed("evaluate"),
    }
    for name in (name for name in generators.wanted(run.config) if name != generators.DREAMBOOTH):
        for role, stage in zip(_roles(name), ("generate", "label")):
            inputs[role] = generators.committed(run, stage, name, "split")
    if outsiders := list(generators.outsiders(run.config)):
        inputs["outsiders"] = [path for name in outsiders for path in generators.committed(run, "dreambooth", name, "split")]
    if run.under(f"{labels.CORRECTIONS}/"):  # of any scope: all of them are figures here
        inputs["corrections"] = [path for name in generators.wanted(run.config) for path in labels.tables(run, "split", name)]
        inputs["earlier"] = gains.earlier(run, inputs["predictions"])
    params = {"scope": "split", "analysis": run.analysis}
    if run.config.report.inception:
        params["inception"] = models.fingerprint(models.here(run.config.report.inception))
    return [run.unit(NAME, FOLDER, inputs, params=params)]


def _roles(generator: str) -> tuple[str, str]:
    """Whose images and labels other than the run's own are inputs of the unit."""
    return f"{generator} images", f"{generator} labels"


def work(config, inputs, output) -> Files:
    import pandas as pd

    from jobs import gains, generators, likeness, lineage
    from shards import crash
    from vhs import metrics
    from vhs.report import render

    predictions, scope = _predictions(inputs), lineage.split_rows(inputs)
    part, judged = metrics.judged(predictions)
    measured = judged[judged.arm == "measure"]
    drawn = {name: _generated(config, inputs, name) for name in generators.wanted(config)}
    generated = drawn.get(generators.DREAMBOOTH)  # None where only others are mixed in
    counts, tables = _of_generated(config, inputs, generated) if generated is not None else (None, {})
    accepted = {name: rows[rows.accepted] for name, rows in drawn.items()}
    compared, of_likeness, near = likeness.compare(config, inputs, scope, accepted, own=generators.DREAMBOOTH)
    outsiders, trainings = _outsiders(config, inputs, drawn), gains.trainings(inputs)
    before = gains.judged_before(trainings)
    summary = metrics.summary(
        predictions,
        labeller=metrics.labeller_quality(measured) if len(measured) else None,
        generated=counts,
        generators={row["generator"]: {name: row[name] for name in OF_OUTSIDERS} for row in outsiders},
        likeness=compared,
        purpose=config.purpose,
        corrected=bool(before),
        patients_known=inputs.facts("splits")["patients_known"],
        unmixed=_unmixed(inputs),
    )
    (output.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    crash.window("report-half-written")
    _write_csvs(predictions, output.folder / "predictions")
    tables |= of_likeness | {"composition": _composition(config, inputs, scope), "generators": pd.DataFrame(outsiders)}
    if len(judged):
        tables |= metrics.tables(judged, config.measure)
    if inputs.markers("prompts"):
        tables["prompts"] = pd.DataFrame(inputs.facts("prompts")["ranking"])[list(OF_PROMPTS)]
    if before:
        tables["corrections"] = metrics.gain_by_corrections(gains.answers(config, inputs.storage, trainings, predictions))
    if len(measured):
        tables["measurement"] = metrics.measurement_by(measured, "source")
    figures = _figures(config, inputs, summary, measured, generated, scope) | _pairs(inputs, near, scope)
    page = render(summary, tables, figures, _notes(config, inputs, part, outsiders, before))
    (output.folder / "index.html").write_text(page, encoding="utf-8")
    return Files({"verdict": metrics.verdict(summary)})


def _predictions(inputs):
    """Every arm's predictions of every scope, each checked to answer each held-out and each validation image once."""
    import pandas as pd

    from vhs import metrics, split

    splits, predictions = inputs.table("splits"), inputs.table("predictions")
    keys = {metrics.HELD_OUT: split.held_out, metrics.VALIDATION: split.inner}
    parts = predictions.groupby(["scope", "role"], sort=False)
    return pd.concat([metrics.joined_once(rows, keys[role](splits, scope)) for (scope, role), rows in parts], ignore_index=True)


def _generated(config, inputs, generator: str):
    """A generator's images with their labels and the class of their measured index, in the order of their numbers."""
    import numpy as np

    from jobs import generators, labels
    from vhs.measure import CLASSES, UNKNOWN

    images, labelled = ("generated", "labels") if generator == generators.DREAMBOOTH else _roles(generator)
    said = labels.corrected(inputs.table(labelled), inputs.table("corrections"))
    rows = inputs.samples(images).merge(said, on="key", validate="one_to_one")
    finite = np.isfinite(rows["index"])  # the label is another word where label_by or a person says so
    measured = np.where(finite, config.measure.classify(rows["index"].where(finite, 0)), UNKNOWN)
    prompted = rows.prompted.map({name: number for number, name in enumerate(CLASSES)}).fillna(UNKNOWN).astype(int)
    rows = rows.assign(prompted=prompted, measured=measured)
    return rows.sort_values(["number", "prompted"], kind="stable", ignore_index=True)


def _of_generated(config, inputs, generated):
    """What the summary and the tables say of what became of the images that the run's own generator drew."""
    from vhs import metrics
    from vhs.measure import CLASSES

    strata = len(CLASSES) * (len(inputs.facts("generator")["sources"]) if config.generation.by_source else 1)
    return metrics.generated_counts(generated, asked=config.generation.quota * strata), metrics.generated_tables(generated)


OF_PROMPTS = ("prompt", "rank", "agreement", "accepted", "distance", "images")  # a marker's facts come by the alphabet
OF_OUTSIDERS = ("asked", "produced", "accepted", "agreement", "trained_on")  # in the summary


def _outsiders(config, inputs, drawn: dict) -> list[dict]:
    """Of each generator outside of the run what became of its images, in `drawn`, and on how many of the data's it says it was trained."""
    from jobs import generators
    from vhs import metrics
    from vhs.measure import CLASSES

    found = []
    for maker in inputs.markers("outsiders"):
        own = drawn[name := maker.facts["generator"]]
        counts = metrics.generated_counts(own, asked=generators.quota(config, name) * len(CLASSES))
        by_class = {label: int((own.accepted & (own.label == number)).sum()) for number, label in enumerate(CLASSES)}
        found.append({"generator": name, **counts, **by_class, "trained_on": maker.facts["trained_on"]})
    return found


def _unmixed(inputs) -> list[tuple[str, str]]:
    """(arm, scope) of arms that are real-matched by another name: there was nothing to mix in."""
    from vhs.arms import REAL

    facts = [marker.facts for marker in inputs.markers("classifiers") if marker.facts["arm"] not in REAL]
    return sorted({(item["arm"], item["scope"]) for item in facts if not item["generated"]})


ORIGINS = {"null": "copies of training images", "oracle": "fresh phantoms", "base": "generated by the base model"}


def _composition(config, inputs, scope):
    """Table 1: images of each class in each part, and how many of either origin each arm trains on."""
    import numpy as np
    import pandas as pd

    from vhs.arms import ARMS, outside
    from vhs.measure import CLASSES

    def row(images: str, origin: str, labels, prior: str = "", steps=None) -> dict:
        counts = {name: int((labels == label).sum()) for label, name in enumerate(CLASSES)}
        no_label = int((labels < 0).sum())
        return {"images": images, "origin": origin, "drawn": prior, **counts, "no label": no_label, "all": len(labels), "optimizer steps": steps}

    parts = (("training", scope.training), ("validation", scope.inner), ("test", scope.held_out))
    rows = [row(name, "real", part.label) for name, part in parts]
    facts = {marker.facts["arm"]: marker.facts for marker in inputs.markers("classifiers") if marker.facts["scope"] == "split"}
    origins = ORIGINS | {name: f"drawn by {name}, outside of this run" for name in outside(config.arms)}
    for arm, said in ((arm, facts[arm]) for arm in [*ARMS, *outside(config.arms)] if arm in facts):
        prior = " : ".join(f"{100 * share:.0f}" for share in said["class_prior"]) if said["class_prior"] else "as they are"
        rows.append(row(f"arm {arm}", "real", scope.training.label, prior, said["steps"]))
        if said["generated"]:
            labels = np.repeat(np.arange(len(CLASSES)), said["generated_by_class"])
            rows.append(row(f"arm {arm}", origins.get(arm, "generated"), labels, prior))
    table = pd.DataFrame(rows)
    return table if table["no label"].any() else table.drop(columns="no label")


def _figures(config, inputs, summary: dict, measured, generated, scope) -> dict[str, bytes]:
    """Drawn figures and contact sheets; what there is nothing to show of is left out."""
    from jobs import sheets
    from vhs import metrics, report

    view, learnt = config.measure, _curves(inputs)
    figures = {"forest": report.forest(summary), "real": sheets.plain(inputs, scope.training)}
    if true := sheets.true(config, inputs, scope.training):
        figures["true"] = true
    if measured["index"].notna().any():
        figures |= {"labeller": report.labeller_scatter(measured, view), "agreement": report.agreement(measured, view)}
    if len(learnt):
        figures["curves"] = report.curves(learnt)
    if generated is None:
        return figures
    accepted, refused = generated[generated.accepted], generated[~generated.accepted]
    if len(bins := metrics.generated_by_index(generated, view)):
        figures["bins"] = report.index_bins(bins, view)
    if len(accepted):
        figures |= {"generated": sheets.plain(inputs, accepted), "measured": sheets.measured(config, inputs, accepted)}
    if len(refused):
        figures["rejected"] = sheets.rejected(config, inputs, refused)
    return figures


def _pairs(inputs, near, scope) -> dict[str, bytes]:
    """The generated images that lie nearest to a training and to a held-out image, each with that image."""
    from jobs import sheets

    if near is None or near.empty:
        return {}
    return {"pairs": sheets.pairs(inputs, near, scope.training, "training"), "pairs_held_out": sheets.pairs(inputs, near, scope.held_out, "held_out")}


def _curves(inputs):
    """The learning curves that the scope's models left, long: model, series, number, step, figure, value."""
    import pandas as pd

    found = []
    for role, model in (("classifiers", "classifier"), ("labeller", "labeller"), ("generator", "DreamBooth")):
        for marker in inputs.markers(role):
            if marker.facts["scope"] != "split" or "curve.json" not in marker.files:
                continue
            for row in json.loads(inputs.storage.read(f"{marker.folder}/curve.json")):
                about = {"model": model, "series": marker.facts.get("arm", model), "number": marker.facts.get("seed", 0), "step": row.pop("step")}
                found += [{**about, "figure": name, "value": value} for name, value in row.items()]
    return pd.DataFrame(found)


def _write_csvs(predictions, folder) -> None:
    """<folder>/<arm>.csv of the test part, as the field's evaluators read them."""
    from vhs import metrics

    folder.mkdir()
    test = predictions[(predictions.scope == "split") & (predictions.role == metrics.HELD_OUT)]
    for arm, rows in test.groupby("arm"):
        (folder / f"{arm}.csv").write_bytes(metrics.evaluator_csv(rows))


def _limit(config, row: dict) -> str:
    """What nobody here can vouch for of a generator outside of the run, and what it fell short of."""
    from jobs import generators
    from vhs.measure import CLASSES

    dose, name = generators.quota(config, row["generator"]), row["generator"]
    short = ", ".join(f"{row[label]} {label}" for label in CLASSES if row[label] < dose)
    taught = f"{row['trained_on']} images of this data and no other of it" if row["trained_on"] else "none of this data"
    said = f"That {name} was trained on {taught} is its owner's word"
    return f"{said}; of its {row['produced']} images fewer were accepted than the {dose} wanted of each class: {short}." if short else f"{said}."


def _notes(config, inputs, part: str, outsiders: list[dict], judged_before: list[str]) -> dict:
    splits, rejects = inputs.facts("splits"), [reject for marker in inputs.markers("real") for reject in marker.facts["rejects"]]
    rejects += splits.get("rejects", [])
    rejects += [reject for row in outsiders for marker in inputs.markers(_roles(row["generator"])[0]) for reject in marker.facts["rejects"]]
    limits = []
    if config.data == "phantoms":
        limits.append(
            f"The real images of this run are drawn ({config.phantoms.style} phantoms), and the base model was schooled on phantoms of another style: "
            "a gain may be knowledge that leaks from the base."
        )
    if judged_before:
        where = f"the held-out images of {', '.join(judged_before)}"
        limits.append(f"Generated labels were corrected after {where} had been judged: whoever did so may have seen how, so this verdict describes.")
    for row in outsiders:
        limits.append(_limit(config, row))
    if rejects:
        limits.append(f"{len(rejects)} files were not used, the first {rejects[0]['file']}: {rejects[0]['reason']}.")
    if unmixed := _unmixed(inputs):
        limits.append(
            f"No generated image was mixed in for {', '.join(f'{arm} ({scope})' for arm, scope in unmixed)}: at least one class had none accepted, "
            "and then origin would tell the class. There the arm and real-matched are the same training."
        )
    plan = _plan(inputs.params["analysis"], part)
    return {"title": config.name, "index": config.measure.index, "plan": plan, "limits": limits, "judged": part, "versions": _versions(inputs)}


def _plan(analysis: dict, part: str) -> dict[str, str]:
    """The frozen analysis in words. It was written for a test part with labels and for the arm mixed: what a run has instead is said here."""
    from vhs.arms import PRIMARY

    seeds, endpoint = analysis["seeds"], analysis["primary_endpoint"]
    if not set(PRIMARY) <= set(analysis["arms"]):
        endpoint = f"none, for {PRIMARY[0]} is not among the arms"
    elif part == "cv":
        endpoint += f"; judged here on {analysis['folds']} folds instead, out of fold, for the test part lacks labels"
    return {
        "purpose": analysis["purpose"],
        "primary endpoint": endpoint,
        "arms": ", ".join(analysis["arms"]),
        "trainings": f"{len(seeds)} of each arm and scope: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        "folds": str(analysis["folds"] or "none"),
        "differences": ", ".join(analysis["differences"]) or "none",
        "looks": str(analysis["looks"]),
    }


def _versions(inputs) -> dict[str, str]:
    """What the generated images were computed with; several values where units ran on unlike machines."""
    numerics = [marker.facts["numerics"] for marker in inputs.markers("generated")]
    return {name: ", ".join(sorted({item[name] for item in numerics} - {""})) for name in (numerics[0] if numerics else ())}

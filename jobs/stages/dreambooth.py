"""dreambooth: the base model fine-tuned on a scope's training images, class images beside them (Ruiz et al. 2023).

It records the keys and patients it saw: the leak guard (jobs/lineage.py) holds what it generates against them. So do the generators beside it
(jobs/generators.py), which train nothing here: controls, and those outside of the run, which say whom they saw.
"""

from __future__ import annotations

from jobs.unit import Files, Unit

NAME, FOLDER, KIND, TORCH = "dreambooth", "generator", "json", True
SCIENCE = ("view", "resolution", "threads", "base", "base_revision", "dreambooth")
AFTER = ("ingest", "split", "priors")


def units(run) -> list[Unit]:
    from jobs import generators

    wanted = generators.wanted(run.config)
    return [_unit(run, scope) if name == generators.DREAMBOOTH else _other(run, name, scope) for scope in run.scopes for name in wanted]


def _unit(run, scope: str) -> Unit:
    from jobs import models

    inputs = {"real": run.committed("ingest"), "splits": run.committed("split"), "priors": run.committed("priors")}
    base, settings = models.fingerprint(models.base(run.config)), run.config.dreambooth
    # what counts as one film decides whose patients the user's own class images are
    alike = {"duplicate_bits": run.config.split.duplicate_bits} if any(concept.class_data_dir for concept in settings.concepts) else {}
    params = {"scope": scope, "base": base, **alike}
    return run.unit(NAME, f"{FOLDER}/{scope}", inputs, params=params, ranks=settings.ranks, apart=bool(settings.sharding))


def _other(run, name: str, scope: str) -> Unit:
    from jobs import generators, models

    inputs = {"real": run.committed("ingest"), "splits": run.committed("split")}
    about = {"base": models.fingerprint(models.base(run.config))} if name == "base" else {}
    if name in generators.outsiders(run.config):
        about = {"trained_on": run.outside(name, scope)["trained_on"], "duplicate_bits": run.config.split.duplicate_bits}
    return run.unit(NAME, f"{FOLDER}/{generators.place(name, scope)}", inputs, params={"scope": scope, "generator": name, **about})


def work(config, inputs, output) -> Files:
    from jobs import outside

    if "trained_on" in inputs.params:
        return outside.record(config, inputs)
    if "generator" in inputs.params:
        return _record(config, inputs)
    return _train(config, inputs, output)


def _record(config, inputs) -> Files:
    """Whom a control has seen: who is copied, or on whom the base model was trained."""
    from jobs import lineage, models

    training, name = lineage.split_rows(inputs).training, inputs.params["generator"]
    before = [models.seen(models.base(config))] if name == "base" else []
    seen = lineage.seen(training if name == "null" else training.head(0), *before)
    return Files({"scope": inputs.params["scope"], "sources": sorted(set(training.source)), **seen})


def _train(config, inputs, output) -> Files:
    import json
    from itertools import product

    import pandas as pd

    from jobs import batches, lineage, models, world
    from vhs import diffusion, dreambooth
    from vhs.measure import CLASSES
    from vhs.prompts import instance_prompt

    settings, scope, priors = config.dreambooth, lineage.split_rows(inputs), inputs.samples("priors")
    rows, own = scope.training, _own(config, inputs, priors[priors.seed.isna()], scope.held_out_patients)
    rows["prompt"] = [instance_prompt(settings, config.measure, CLASSES[row.label], row.source) for row in rows.itertuples()]
    for name, source in product(CLASSES, sorted(set(rows.source)) if config.generation.by_source else ()):
        instance_prompt(settings, config.measure, name, source)  # one that generation will lack is missed before the training, not after it
    epochs = batches.Epochs(inputs.storage, rows, settings.batch, batches.shuffled(len(rows), settings.seed))
    components = diffusion.load(models.base(config))
    curve = dreambooth.train(
        components,
        epochs,
        (batches.load_images(inputs.storage, priors), priors.prompt.tolist()),
        settings,
        batches_per_epoch=epochs.steps,
        accelerator=world.accelerator(config.execution.device, settings.mixed_precision, settings.sharding),
        progress=output.progress,
        show=_samples(config, rows, output.logbook),
        show_steps=config.execution.sample_steps,
    )
    if world.rank() == 0:  # whose folder counts; on the other ranks transformers saves nothing
        diffusion.save(components, output.folder)
    curve.save(output.folder)
    seen = lineage.seen(pd.concat([rows[["key", "patient"]], own]), models.seen(models.base(config)))
    (output.folder / "lineage.json").write_text(json.dumps(seen, indent=1))
    return Files({"scope": inputs.params["scope"], "sources": sorted(set(rows.source)), "trained_by": curve.trained_by, **seen})


def _own(config, inputs, given, held_out_patients):
    """The data's images (key, patient) among `given`, the class images that the user brought. LeakError for one of a held-out patient."""
    from jobs import batches, lineage
    from vhs.duplicates import perceptual_hash

    hashes = [perceptual_hash(image) for image in batches.load_images(inputs.storage, given)] if len(given) else []
    real = lineage.with_patients(inputs.samples("real"), inputs.table("splits"))
    return lineage.own_class_images(given.assign(phash=hashes), real, held_out_patients, config.split.duplicate_bits)


def _samples(config, rows, logbook):
    """Draws an image of each class as generation would, each time from the same noise, so that one sees what training does."""
    from jobs.drawing import image_seed
    from vhs.measure import CLASSES
    from vhs.sampling import sample

    prompts = {CLASSES[row.label]: row.prompt for row in rows.drop_duplicates("label").itertuples()}
    seeds = [image_seed(config.generation.seed, "sample", name) for name in prompts]

    def show(step: int, model) -> None:
        for name, image in zip(prompts, sample(model, list(prompts.values()), seeds, config.resolution, config.generation)):
            logbook.picture(step, name, image)

    return show

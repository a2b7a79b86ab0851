"""train: one timm classifier for each arm, scope and seed, from fresh weights every time.

real          the scope's training images, each once an epoch, as the study did
mixed         those and the accepted generated images, both origins drawn with the same class prior (else origin would tell the class)
real-matched  real images only, with mixed's class prior, optimizer steps, initial weights and augmentation: what mixed is compared with
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.unit import Files, Unit

NAME, FOLDER, KIND, TORCH = "train", "classifier", "json", True
SCIENCE = ("resolution", "threads", "classifier", "generation.quota")
AFTER = ("ingest", "split", "labeller", "dreambooth", "generate", "label")


def units(run) -> list[Unit]:
    from vhs.split import scopes

    return [
        _unit(run, arm, scope, seed)
        for scope in scopes(run.config.split)
        for arm in run.config.arms
        if arm != "measure"
        for seed in run.config.seeds
    ]


def _unit(run, arm: str, scope: str, seed: int) -> Unit:
    inputs = {"real": run.committed("ingest"), "splits": run.committed("split")}
    if arm != "real":  # real-matched looks at how many images mixed trains on, not at the images
        inputs |= {
            "generated": run.committed("generate", scope=scope),
            "labels": run.committed("label", scope=scope),
            "generator": run.committed("dreambooth", scope=scope),
            "labeller": run.committed("labeller", scope=scope),
        }
    return run.unit(
        NAME,
        f"{FOLDER}/{arm}/{scope}/seed-{seed}",
        inputs,
        params={"arm": arm, "scope": scope, "seed": seed},
        ranks=run.config.classifier.ranks,
    )


def work(config, inputs, output) -> Files:
    from functools import partial

    from jobs import batches, world
    from vhs import training
    from vhs.networks import build_classifier, save_classifier
    from vhs.radiograph import augment

    settings, plan = config.classifier, _plan(config, inputs)
    epochs = batches.Epochs(inputs.storage, plan.rows, settings.batch, plan.order)
    vary = partial(
        augment,
        rotation_deg=settings.rotation_deg,
        zoom=settings.zoom,
        shift=settings.shift,
        flip=config.measure.mirror if settings.flip else None,
        gamma=settings.gamma,
    )
    seed = inputs.params["seed"]
    model = training.fit(
        build_classifier(settings, seed=seed),
        training.cross_entropy(settings.label_smoothing),
        epochs,
        steps=settings.epochs * epochs.steps,
        steps_per_epoch=epochs.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        accelerator=world.accelerator(config.execution.device),
        progress=output.progress,
        seed=seed,
        augment=vary,
        size_px=settings.size_px,
    )
    save_classifier(model, settings, output.folder)
    return Files(
        {
            **inputs.params,
            "real": plan.real,
            "generated": plan.generated,
            "steps": settings.epochs * epochs.steps,
            "class_prior": plan.prior,
        }
    )


@dataclass(frozen=True)
class Plan:
    """What an arm trains on: rows, and the order of each epoch. `real`, `generated`: how many different images of each origin."""

    rows: object
    order: object
    real: int
    generated: int
    prior: list[float] | None


def _plan(config, inputs) -> Plan:
    import numpy as np
    import pandas as pd

    from jobs import batches, lineage, rounds
    from shards import reader
    from vhs.measure import CLASSES

    scope, arm, seed = lineage.split_rows(inputs), inputs.params["arm"], inputs.params["seed"]
    columns = [*batches.ORDER_COLUMNS, "label"]
    real = scope.training[columns]
    if arm == "real":
        return Plan(real, batches.shuffled(len(real), seed), len(real), 0, None)
    records = {marker.path: marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)}
    drawn = rounds.accepted(inputs.samples("generated"), inputs.table("labels"), config.generation.quota)
    lineage.guard(drawn, records, scope.held_out_patients)
    prior = (
        np.full(len(CLASSES), 1 / len(CLASSES))
        if config.classifier.class_prior == "balanced"
        else np.bincount(real.label, minlength=len(CLASSES)) / len(real)
    )
    if set(drawn.label) != set(np.flatnonzero(prior)):
        drawn = drawn.head(
            0
        )  # a class without a single accepted image cannot be drawn with the prior; without it origin would tell the class
    n_real, n_drawn = len(real), len(drawn)
    if arm == "real-matched" or not n_drawn:
        return Plan(real, lambda epoch: reader.deck(real.label.to_numpy(), prior, n_real + n_drawn, seed, epoch), n_real, 0, prior.tolist())

    def order(epoch: int) -> np.ndarray:
        both = np.concatenate(
            [
                reader.deck(real.label.to_numpy(), prior, n_real, seed, epoch),
                n_real + reader.deck(drawn.label.to_numpy(), prior, n_drawn, seed, epoch),
            ]
        )
        return both[reader.permutation(len(both), seed, epoch)]

    return Plan(pd.concat([real, drawn[columns]], ignore_index=True), order, n_real, n_drawn, prior.tolist())

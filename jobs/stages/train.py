"""train: one timm classifier for each arm, scope and seed, from fresh weights every time.

real          the scope's training images, each once an epoch, as the study did
mixed         those and the accepted generated images, both origins drawn with the same class prior (else origin would tell the class)
real-matched  real images only, with mixed's class prior, optimizer steps, initial weights and augmentation: what mixed is compared with
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.unit import Files, Unit

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

NAME, FOLDER, KIND, TORCH = "train", "classifier", "json", True
SCIENCE = ("resolution", "threads", "classifier", "generation.quota", "generation.round_units", "generation.max_rounds")
AFTER = ("ingest", "split", "labeller", "dreambooth", "generate", "label")
MORE = 1_000_003  # to the seed: the deck of what is added to the real images


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

    settings, draw = config.classifier, _draw(config, inputs)
    epochs = batches.Epochs(inputs.storage, draw.rows, settings.batch, draw.order)
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
            "real": draw.real,
            "generated": draw.generated,
            "steps": settings.epochs * epochs.steps,
            "class_prior": draw.prior,
        }
    )


@dataclass(frozen=True)
class Draw:
    """What an arm trains on: a table of images, and which of its rows each epoch draws. `real`, `generated`: images of each origin in it."""

    rows: pd.DataFrame
    order: Callable[[int], np.ndarray]
    real: int
    generated: int
    prior: list[float] | None


def _draw(config, inputs) -> Draw:
    """The arm's images in its order. Mixed and real-matched draw the same real images at the same places; where mixed then draws generated images,
    real-matched draws further real ones of the same classes."""
    import numpy as np
    import pandas as pd

    from jobs import batches, lineage
    from shards import reader

    arm, seed, scope = inputs.params["arm"], inputs.params["seed"], lineage.split_rows(inputs)
    columns = [*batches.ORDER_COLUMNS, "label"]
    real = scope.training[columns]
    if arm == "real":
        return Draw(real, batches.shuffled(len(real), seed), len(real), 0, None)
    prior = _prior(config, real)
    drawn = _mixable(_guarded(config, inputs, scope.held_out_patients), prior)[columns]
    rows, first = (pd.concat([real, drawn], ignore_index=True), len(real)) if arm == "mixed" else (real, 0)
    added = drawn if arm == "mixed" else real

    def order(epoch: int) -> np.ndarray:
        parts = [reader.deck(real.label.to_numpy(), prior, len(real), seed, epoch)]
        if len(drawn):
            parts.append(first + reader.deck(added.label.to_numpy(), prior, len(drawn), seed + MORE, epoch))
        both = np.concatenate(parts)
        return both[reader.permutation(len(both), seed, epoch)]

    return Draw(rows, order, len(real), len(drawn) if arm == "mixed" else 0, prior)


def _prior(config, real: pd.DataFrame) -> list[float]:
    """The class prior of mixed and real-matched, the same for both origins."""
    import numpy as np

    from vhs.measure import CLASSES

    if config.classifier.class_prior == "balanced":
        return [1 / len(CLASSES)] * len(CLASSES)
    return (np.bincount(real.label, minlength=len(CLASSES)) / len(real)).tolist()


def _guarded(config, inputs, held_out_patients: frozenset[str]) -> pd.DataFrame:
    """The accepted generated images of the scope, past the leak guard."""
    from jobs import lineage, rounds

    drawn = rounds.accepted(inputs.samples("generated"), inputs.table("labels"), config.generation.quota)
    records = {marker.path: marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)}
    lineage.guard(drawn, records, held_out_patients)
    return drawn


def _mixable(drawn: pd.DataFrame, prior: list[float]) -> pd.DataFrame:
    """`drawn`, or none of it where a class has no accepted image: it could not be drawn with the prior, and then origin would tell the class."""
    wanted = {label for label, share in enumerate(prior) if share}
    return drawn if wanted <= set(drawn.label) else drawn.head(0)

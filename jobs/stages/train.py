"""train: one timm classifier for each arm, scope and seed, from fresh weights every time.

real          the scope's training images, each once an epoch, as the study did
mixed         those and the accepted generated images, both origins drawn with the same class prior (else origin would tell the class)
real-matched  real images only, with mixed's class prior, optimizer steps, initial weights and augmentation: what mixed is compared with
pretrain      generated images first, real ones after, each with mixed's class prior, together mixed's optimizer steps
null, oracle, base   as mixed, with images of another generator (jobs/generators.py), as many draws of them
any other            as mixed, with `dose` images of each class of the generator of its name (jobs/outside.py), as many draws

Learning-rate schedules and the choice of an epoch look at the scope's inner validation, never at held-out images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.unit import Files, Unit
from vhs.arms import UNTRAINED

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from jobs.lineage import ScopeRows
    from vhs.settings import Classifier

    Order = Callable[[int], np.ndarray]  # epoch -> the numbers of the rows drawn

NAME, FOLDER, KIND, TORCH = "train", "classifier", "json", True
SCIENCE = ("resolution", "threads", "classifier", "generation.quota", "generation.round_units", "generation.max_rounds")
AFTER = ("ingest", "split", "labeller", "dreambooth", "generate", "label")
MORE = 1_000_003  # to the seed: the deck of what is added to the real images


def units(run) -> list[Unit]:
    return [
        _unit(run, arm, scope, seed)
        for scope in run.scopes
        for arm in run.config.arms
        if arm not in UNTRAINED
        for seed in run.config.seeds
    ]


def made_of(run, arm: str, scope: str) -> dict[str, list[str]]:
    """The inputs of an arm's units, by role. What mixed trains on is among those of every arm but real: how many images these are."""
    from jobs import generators

    inputs, generator = {"real": run.committed("ingest"), "splits": run.committed("split")}, generators.of_arm(run.config, arm)
    if arm == "real":
        return inputs
    for role, stage in (("generated", "generate"), ("labels", "label"), ("generator", "dreambooth")):
        inputs[role] = generators.committed(run, stage, generator, scope)
        if generator != generators.DREAMBOOTH:
            inputs[f"mixed_{role}"] = generators.committed(run, stage, generators.DREAMBOOTH, scope)
    inputs["labeller"] = run.committed("labeller", scope=scope)
    if said := _said(run, arm, scope):
        inputs["corrections"] = said
    return inputs


def _said(run, arm: str, scope: str) -> list[str]:
    """The tables of a person's words by which the arm is trained otherwise: on the images it mixes in, and, where these are not mixed's, on mixed's if they
    changed how many of each class there are to draw."""
    from jobs import generators, labels, rounds

    of_mixed, generator = labels.tables(run, scope), generators.of_arm(run.config, arm)
    if generator == generators.DREAMBOOTH and arm != "real-matched":
        return of_mixed
    counted = of_mixed if rounds.recounted(run, scope) else []
    return counted if arm == "real-matched" else counted + labels.tables(run, scope, generator)


def _unit(run, arm: str, scope: str, seed: int) -> Unit:
    from jobs import generators, models

    dose = {"dose": generators.quota(run.config, arm)} if arm in generators.outsiders(run.config) else {}
    return run.unit(
        NAME,
        f"{FOLDER}/{arm}/{scope}/seed-{seed}",
        made_of(run, arm, scope),
        params={"arm": arm, "scope": scope, "seed": seed, **dose, **models.classifier(run.config)},
        ranks=run.config.classifier.ranks,
        apart=bool(run.config.classifier.sharding),
    )


def work(config, inputs, output) -> Files:
    import json

    import pandas as pd

    from jobs import lineage, models
    from vhs.networks import save_classifier

    scope = lineage.split_rows(inputs)
    model, curve, facts = fit(config, inputs, scope, output)
    save_classifier(model, config.classifier, output.folder)
    curve.save(output.folder)
    makers = [marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)]
    seen = lineage.seen(pd.concat([scope.training, scope.inner]), models.seen(models.here(config.classifier.weights)), *makers)
    (output.folder / "lineage.json").write_text(json.dumps(seen, indent=1))
    return Files({**inputs.params, **facts})


def fit(config, inputs, scope, output, told: Callable[[dict], None] = lambda figures: None):
    """Train the arm of `inputs` on `scope`'s training images -> (model, its Curve, facts of the training). `told` hears, after every epoch, what the
    inner validation says, and may raise to end it. Of `scope` it asks training, inner, held_out_patients and held_out_keys, of `output` the progress."""
    import numpy as np

    from jobs import batches, lineage, models, world
    from vhs import augmentation, training
    from vhs.curve import Curve
    from vhs.measure import CLASSES
    from vhs.networks import build_classifier

    settings = models.begun_from(config.classifier)
    lineage.guard_weights(config.classifier.weights, models.seen(settings.weights), scope)
    draw = _draw(config, inputs, scope)
    epochs = batches.Epochs(inputs.storage, draw.rows, settings.batch, draw.order, pair_last=True)
    steps = settings.epochs * epochs.steps
    counts = np.bincount(draw.rows.label.to_numpy()[draw.order(0)], minlength=len(CLASSES))
    weights = training.balanced_weights(counts) if settings.class_weights == "balanced" else None
    accelerator = world.accelerator(config.execution.device, settings.mixed_precision, settings.sharding)
    inner = batches.Epochs(inputs.storage, scope.inner, settings.batch, lambda epoch: np.arange(len(scope.inner)))
    truth = dict(zip(scope.inner.key, scope.inner.label, strict=True))
    seed, curve = inputs.params["seed"], Curve(steps)
    by_class = np.bincount(draw.rows.label[draw.real :], minlength=len(CLASSES)).tolist()
    facts = {"real": draw.real, "generated": draw.generated, "generated_by_class": by_class}
    facts |= {"steps": steps, "class_prior": draw.prior, "class_weights": weights}
    judge = training.inner_validation(lambda: inner(0, 0), truth, accelerator, settings.size_px)

    def validate(model) -> dict[str, float]:
        figures = judge(model)
        told({**facts, **figures})
        return figures

    model = training.fit(
        build_classifier(settings, seed=seed),
        training.cross_entropy(settings.label_smoothing, weights),
        epochs,
        steps=steps,
        steps_per_epoch=epochs.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        accelerator=accelerator,
        progress=output.progress,
        seed=seed,
        augment=augmentation.for_classifier(settings, config.measure.mirror),
        size_px=settings.size_px,
        curve=curve,
        validate=validate,
        plateau={"patience": settings.plateau_patience, "factor": settings.plateau_factor} if settings.schedule == "plateau" else None,
        keep_best=settings.keep == "best_inner",
        sharding=settings.sharding,
    )
    return model, curve, facts | {"trained_by": curve.trained_by}


@dataclass(frozen=True)
class Draw:
    """What an arm trains on: a table of images, and which of its rows each epoch draws. `real`, `generated`: images of each origin in it, real ones
    first."""

    rows: pd.DataFrame
    order: Order
    real: int
    generated: int
    prior: list[float] | None


def _draw(config, inputs, scope: ScopeRows) -> Draw:
    """The arm's images in its order. Mixed and real-matched draw the same real images at the same places; where mixed then draws generated
    images, real-matched draws further real ones of the same classes, and a control's arm its own. Without any to mix, all arms but real are
    real-matched."""
    import pandas as pd

    from jobs import batches, generators

    arm, seed = inputs.params["arm"], inputs.params["seed"]
    columns = [*batches.ORDER_COLUMNS, "label"]
    real = scope.training[columns]
    if arm == "real":
        return Draw(real, batches.shuffled(len(real), seed), len(real), 0, None)
    prior = _prior(config, real)
    made = bool(inputs.markers("generator"))  # else only controls are mixed in
    drawn = accepted(config, inputs, scope) if made else real.head(0)
    own = made and generators.of_arm(config, arm) == generators.DREAMBOOTH
    counts = drawn.label.value_counts() if own else _mixed(config, inputs, scope.training.source.nunique())
    if "dose" not in inputs.params:
        drawn = drawn[drawn.groupby("label").cumcount() < drawn.label.map(counts).fillna(0)]
    drawn = drawn[columns]
    count = _mixable(counts, prior)
    if arm == "real-matched" or not count or not _mixable(drawn.label.value_counts(), prior):
        return Draw(real, _together(real, real, 0, count, prior, seed), len(real), 0, prior)
    rows = pd.concat([real, drawn], ignore_index=True)
    if arm == "pretrain":
        order = _one_after_the_other(real, drawn, prior, seed, config.classifier)
    else:
        order = _together(real, drawn, len(real), count, prior, seed)
    return Draw(rows, order, len(real), len(drawn), prior)


def _together(real: pd.DataFrame, others: pd.DataFrame, offset: int, count: int, prior: list[float], seed: int) -> Order:
    """Each epoch as many draws of `real` as it has rows, and `count` of `others` (whose numbers begin at `offset`), shuffled together."""
    import numpy as np

    from shards import reader

    def order(epoch: int) -> np.ndarray:
        parts = [reader.deck(real.label.to_numpy(), prior, len(real), seed, epoch)]
        if count:
            parts.append(offset + reader.deck(others.label.to_numpy(), prior, count, seed + MORE, epoch))
        both = np.concatenate(parts)
        return both[reader.permutation(len(both), seed, epoch)]

    return order


def _one_after_the_other(real: pd.DataFrame, drawn: pd.DataFrame, prior: list[float], seed: int, settings: Classifier) -> Order:
    """Epochs as long as mixed's: `drawn` (numbered after the real ones) up to `pretrain_share` of all optimizer steps, then real rows."""
    import numpy as np

    from shards import reader

    draws = len(real) + len(drawn)
    steps = -(-draws // settings.batch)
    generated_steps = round(settings.pretrain_share * settings.epochs * steps)

    def order(epoch: int) -> np.ndarray:
        first = len(real) + reader.deck(drawn.label.to_numpy(), prior, draws, seed + MORE, epoch)
        then = reader.deck(real.label.to_numpy(), prior, draws, seed, epoch)
        turn = max(0, generated_steps - epoch * steps) * settings.batch
        return np.concatenate([first[:turn], then[turn:]])

    return order


def _prior(config, real: pd.DataFrame) -> list[float]:
    """The class prior of every arm but real, the same for both origins."""
    import numpy as np

    from vhs.measure import CLASSES

    if config.classifier.class_prior == "balanced":
        return [1 / len(CLASSES)] * len(CLASSES)
    return (np.bincount(real.label, minlength=len(CLASSES)) / len(real)).tolist()


def accepted(config, inputs, scope) -> pd.DataFrame:
    """The accepted generated images of the scope that `inputs` are of, past the leak guard: what the arm adds to the real ones. Of `scope` it asks
    held_out_patients and held_out_keys."""
    from jobs import labels, lineage, rounds

    drawn = rounds.accepted(inputs.samples("generated"), labels.of(inputs), inputs.params.get("dose", config.generation.quota))
    records = {marker.path: marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)}
    lineage.guard(drawn, records, scope)
    return drawn


def _mixed(config, inputs, sources: int) -> pd.Series:
    """How many generated images of each class (its number) the arm mixed trains on; in a run without that arm what the quota asks for."""
    import pandas as pd

    from jobs import labels, rounds
    from vhs.measure import CLASSES

    if inputs.markers("mixed_generator"):
        said = labels.corrected(inputs.table("mixed_labels"), inputs.table("corrections"))
        return rounds.accepted(inputs.samples("mixed_generated"), said, config.generation.quota).label.value_counts()
    return pd.Series(config.generation.quota * (sources if config.generation.by_source else 1), index=range(len(CLASSES)))


def _mixable(counts: pd.Series, prior: list[float]) -> int:
    """Images in all of `counts` by class, or 0 where a class has none: it could not be drawn with the prior, and then origin would tell the class."""
    wanted = {label for label, share in enumerate(prior) if share}
    return int(counts.sum()) if wanted <= set(counts[counts > 0].index) else 0

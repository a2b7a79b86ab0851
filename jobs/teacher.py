"""A teacher labels by look, for sets that have classes but no key points (`label_by: teacher`): a classifier of a scope's real training images.

It lies in the scope's labeller folder, so that folder's lineage covers it. Its word counts where it is at least as confident as it had to be on the
inner validation for SURE of its answers to be right. So that these images say what it will be worth on others, nothing else is chosen by them: it is
trained by the cosine schedule to its last weights, each image once an epoch and all weighing the same, whatever UNUSED says to the arms.
"""

from __future__ import annotations

from collections.abc import Callable

from vhs.settings import Classifier

SURE = 0.9
# of the classifier section: what goes by the inner validation, by the arms' draws of classes and origins, or by the arms' own ranks
UNUSED = ("schedule", "plateau_patience", "plateau_factor", "keep", "class_weights", "class_prior", "pretrain_share", "ranks", "sharding")


def science(classifier: dict) -> dict:
    """Of the science of the classifier section what a teacher depends on; the rest as if nothing were said of it."""
    usual = Classifier().model_dump(mode="json")
    return classifier | {name: usual[name] for name in UNUSED if name in classifier}


def train(config, inputs, output, scope, after: int) -> float:
    """Trains the teacher on `scope.training` into OUT/teacher -> the least confidence at which it is believed. `after`: steps of the unit before it."""
    import numpy as np

    from jobs import batches, models, world
    from vhs import augmentation, training
    from vhs.networks import build_classifier, save_classifier

    choice = Classifier.model_validate(science(config.classifier.model_dump(mode="json")))
    settings = models.begun_from(choice)
    order = batches.shuffled(len(scope.training), config.labeller.seed)
    epochs = batches.Epochs(inputs.storage, scope.training, settings.batch, order, pair_last=True)
    accelerator = world.accelerator(config.execution.device, settings.mixed_precision)
    model = training.fit(
        build_classifier(settings, seed=config.labeller.seed),
        training.cross_entropy(settings.label_smoothing),
        epochs,
        steps=settings.epochs * epochs.steps,
        steps_per_epoch=epochs.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        accelerator=accelerator,
        progress=Phase(output.progress, "teacher", after),
        seed=config.labeller.seed,
        augment=augmentation.for_classifier(settings, config.measure.mirror),
        size_px=settings.size_px,
    )
    inner = batches.Epochs(inputs.storage, scope.inner, settings.batch, lambda epoch: np.arange(len(scope.inner)))
    probability = training.predict(model, inner(0, 0), accelerator, size_px=settings.size_px)["probability"]  # in the order of keys, as the rows
    (output.folder / "teacher").mkdir()
    save_classifier(model, choice, output.folder / "teacher")
    return least_confidence(probability.max(1), probability.argmax(1) == scope.inner.label.to_numpy())


def least_confidence(confidence, right) -> float:
    """The least confidence such that, of the images with as much or more, SURE of the answers are right; above 1 if there is none."""
    import numpy as np

    order = np.argsort(-confidence, kind="stable")
    good = np.flatnonzero(np.cumsum(right[order]) >= SURE * np.arange(1, len(order) + 1))
    return float(confidence[order[good[-1]]]) if good.size else 1.1


def answers(config, inputs, rows):
    """The teacher's class of each of `rows` int64 [N], and whether it is sure bool [N]."""
    import numpy as np
    import pandas as pd

    from jobs import batches, world
    from vhs.networks import load_classifier
    from vhs.training import predict

    model, settings = load_classifier(inputs.folder("labeller") / "teacher")
    epochs = batches.Epochs(inputs.storage, rows, settings.batch, lambda epoch: np.arange(len(rows)))
    found = predict(model, epochs(0, 0), world.accelerator(config.execution.device), size_px=settings.size_px)
    probability = pd.DataFrame(found["probability"], index=found["key"]).loc[rows.key].to_numpy()
    return probability.argmax(1), probability.max(1) >= inputs.facts("labeller")["teacher_confidence"]


class Phase:
    """One of several loops of a unit: it goes on from its own checkpoints only, so a crash in a later loop repeats the ones before it.

    `after`: steps of the loops before. The highest step is taken for the newest, so those of a later loop have to be the higher ones.
    """

    def __init__(self, progress, name: str, after: int = 0):
        self._progress, self._name, self._after = progress, name, after

    def resume(self) -> dict | None:
        state = self._progress.resume()
        return state if state and state.get("phase") == self._name else None

    def step(self, step: int, total: int, metrics: dict[str, float], capture: Callable[[], dict]) -> None:
        self._progress.step(self._after + step, self._after + total, metrics, lambda: {"phase": self._name, **capture()})

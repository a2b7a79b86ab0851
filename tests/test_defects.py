"""The seven defects of the study's notebooks, each made again and refused by name, or shown to be absent to the bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import KFold

from jobs import lineage, models, trial
from jobs.attempt import Inputs
from jobs.config import ConfigError, load
from jobs.plan import reopen
from jobs.stages import train
from vhs import metrics, split
from vhs.metrics import VALIDATION
from vhs.settings import Split


@pytest.fixture(scope="module")
def run(reference):
    return reopen(str(reference))


def inputs_of(run, arm: str) -> Inputs:
    return Inputs(run.storage, next(unit for unit in run.units("train") if unit.params["arm"] == arm))


def test_1_one_model_carried_through_all_folds(run):
    """The next fold begins with the last one's weights: they say whom they saw, and one of those is held out now."""
    unit = next(unit for unit in run.units("train") if unit.params["arm"] == "mixed")
    folder = str(run.storage.local(run.marker(unit.marker).folder))
    seen = models.seen(folder)["patients_seen"]
    scope = lineage.split_rows(inputs_of(run, "mixed"))
    assert len(seen) > 20
    with pytest.raises(lineage.LeakError, match=f"classifier.weights = .* trained on held-out patient {seen[3]}"):
        lineage.guard_weights(folder, models.seen(folder), replace(scope, held_out_patients=frozenset([seen[3]])))
    lineage.guard_weights(folder, models.seen(folder), scope)


def test_2_kfold_over_images_tears_patients_apart():
    """scikit-learn's KFold over images, two of each dog: its first fold as a given split."""
    images = pd.DataFrame({"key": [f"{n:016x}" for n in range(120)], "patient": [f"dog {n // 2}" for n in range(120)], "source": "clinic"})
    images["label"] = images.index // 2 % 3
    _, test = next(KFold(5, shuffle=True, random_state=0).split(images))
    images["split"] = np.where(images.index.isin(test), "test", "train")
    with pytest.raises(ValueError, match=r"the given split tears \d+ patients apart"):
        split.make_split(images, Split())
    ours = split.make_split(images.drop(columns="split"), Split(folds=5))
    assert ours.groupby("patient")[["part", "fold"]].nunique().max().max() == 1
    by_class = ours[ours.part == "train"].groupby(["fold", "label"]).size().unstack()
    assert (by_class.max() - by_class.min()).max() <= 2  # a dog's two images


def test_3_training_augmentation_in_validation(run):
    """What was answered is what the images as they are give, to the bit, on the held-out ones and on the inner validation; augmented they give other
    answers, and whoever asks for that is told that there is no such thing."""
    from jobs import batches, world
    from shards import manifest
    from vhs import augmentation
    from vhs.networks import load_classifier
    from vhs.training import predict

    world.set_numerics(run.config.threads)
    unit = next(unit for unit in run.units("evaluate") if unit.params["arm"] == "mixed")
    inputs, stored = Inputs(run.storage, unit), manifest.read(run.storage, unit.marker).to_pandas()
    scope = lineage.split_rows(inputs)
    rows = pd.concat([scope.held_out, scope.inner]).sort_values("key", ignore_index=True)
    model, settings = load_classifier(inputs.folder("classifier"))
    epochs, accelerator = batches.Epochs(run.storage, rows, settings.batch, lambda epoch: np.arange(len(rows))), world.accelerator("cpu")
    plain = predict(model, epochs(0, 0), accelerator, size_px=settings.size_px)
    assert set(stored.role) == {"held-out", VALIDATION} and plain["key"] == stored.key.tolist()
    assert np.array_equal(plain["probability"], stored[["p_small", "p_normal", "p_large"]].to_numpy())
    augment = augmentation.for_classifier(settings, run.config.measure.mirror)
    with pytest.raises(TypeError, match="augment"):
        predict(model, epochs(0, 0), accelerator, size_px=settings.size_px, augment=augment)


def test_4_a_plateau_that_looks_at_the_last_training_batch(run):
    from test_training import Tape
    from test_training import train as fit

    with pytest.raises(ValueError, match="plateau and keep_best read off a validation: give `validate`"):
        fit(Tape(), plateau={"patience": 5})
    with pytest.raises(ConfigError, match="classifier.plateau_on: no such key"):
        load("debug/demo", ["classifier.plateau_on=training_loss"])


def test_5_colour_operations_on_grey_images():
    from vhs.augmentation import GreyRandAugment

    assert not {"Color", "Posterize", "Solarize", "Invert", "ShearX", "ShearY"} & set(GreyRandAugment._AUGMENTATION_SPACE)
    with pytest.raises(ConfigError, match="classifier.color_jitter: no such key"):
        load("debug/demo", ["classifier.color_jitter=0.4"])


def test_6_the_best_epoch_by_the_fold_that_is_reported(run):
    """No setting asks for it, and what trains or searches is not given those images."""
    with pytest.raises(ConfigError, match="classifier.keep = 'best_test': legal is last, best_inner"):
        load("debug/demo", ["classifier.keep=best_test"])
    inside = trial.Inside(run.storage, next(unit for unit in run.units("train") if unit.params["arm"] == "mixed"))
    with pytest.raises(lineage.LeakError, match="asked for the held-out images: the test split is closed"):
        _ = inside.held_out


def test_7_generated_images_in_validation_and_a_generator_that_saw_it(run):
    inputs = inputs_of(run, "mixed")
    scope, generated = lineage.split_rows(inputs), inputs.samples("generated")
    answers = pd.DataFrame({"key": [*scope.inner.key, generated.key[0]], "arm": "mixed", "seed": 0})
    with pytest.raises(ValueError, match=f"1 without being asked \\({generated.key[0]}\\)"):
        metrics.joined_once(answers, scope.inner.key)
    seen = inputs.facts("generator")["patients_seen"]
    assert not set(seen) & (set(scope.inner.patient) | scope.held_out_patients), "the run's own generator saw training images alone"
    labels = inputs.table("labels").assign(accepted=True)
    rows = generated.merge(labels, on="key")
    records = {marker.path: marker.facts for role in ("generator", "labeller") for marker in inputs.markers(role)}
    with pytest.raises(lineage.LeakError, match=f"its generator .* was trained on held-out patient {seen[0]}"):
        lineage.guard(rows, records, replace(scope, held_out_patients=scope.held_out_patients | {seen[0]}))
    assert train.accepted(run.config, inputs, scope) is not None

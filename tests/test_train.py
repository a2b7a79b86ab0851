"""The arms: what each one draws, what its training may look at, and what it says of whom."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, vhs

from jobs import lineage, models, teacher
from jobs.attempt import Inputs, Output
from jobs.plan import Run, reopen
from jobs.stages import evaluate, train
from shards import manifest
from vhs.checkpoint import Silent

ARMS = ("real", "real-matched", "mixed", "pretrain")


class Given(Inputs):
    """The inputs of a train unit with another arm, every generated image accepted, or other labels on the images of one `role` of the scope."""

    def __init__(self, inputs: Inputs, arm: str = "real", relabelled: str | None = None):
        super().__init__(inputs.storage, inputs._unit)
        self.params, self._relabelled = {**self.params, "arm": arm}, relabelled

    def samples(self, role):
        rows = super().samples(role)
        if role == "real" and self._relabelled:
            chosen = rows.key.isin(getattr(lineage.split_rows(Given(self)), self._relabelled).key)
            rows.loc[chosen, "label"] = (rows.label[chosen] + 1) % 3
        return rows


@pytest.fixture(scope="module")
def mixed(reference):
    """The finished debug run and the inputs of its mixed arm."""
    run = reopen(str(reference))
    (unit,) = [unit for unit in run.units("train") if unit.params["arm"] == "mixed"]
    return run, Inputs(run.storage, unit)


@pytest.fixture(scope="module")
def draws(mixed):
    """What each arm draws."""
    run, inputs = mixed
    scope = lineage.split_rows(inputs)
    return {arm: train._draw(run.config, Given(inputs, arm), scope) for arm in ARMS}


def labels(draw: train.Draw, epoch: int) -> np.ndarray:
    return draw.rows.label.to_numpy()[draw.order(epoch)]


def test_real_takes_every_image_once_an_epoch(draws):
    draw = draws["real"]
    assert draw.generated == 0 and draw.prior is None
    for epoch in range(3):
        assert sorted(draw.order(epoch)) == list(range(draw.real))
    assert draw.order(0).tolist() != draw.order(1).tolist()


def test_real_matched_differs_from_mixed_in_the_generated_images_alone(draws):
    matched, mixed = draws["real-matched"], draws["mixed"]
    assert mixed.generated > 0 and matched.generated == 0 and matched.prior == mixed.prior
    for epoch in range(3):
        a, b = matched.order(epoch), mixed.order(epoch)
        assert len(a) == len(b) and (labels(matched, epoch) == labels(mixed, epoch)).all()
        real = b < mixed.real
        assert (matched.rows.key.to_numpy()[a[real]] == mixed.rows.key.to_numpy()[b[real]]).all()
        assert real.sum() == mixed.real and (a < matched.real).all()


@pytest.mark.parametrize("share", [0.2, 0.5, 0.7])
def test_pretrain_draws_generated_images_first_and_takes_mixeds_steps(mixed, draws, share):
    run, inputs = mixed
    settings = run.config.classifier.model_copy(update={"pretrain_share": share})
    draw = train._draw(run.config.model_copy(update={"classifier": settings}), Given(inputs, "pretrain"), lineage.split_rows(inputs))
    assert (draw.generated, draw.prior) == (draws["mixed"].generated, draws["mixed"].prior)
    length, epochs = len(draws["mixed"].order(0)), settings.epochs
    steps = -(-length // settings.batch)
    generated = []  # of each optimizer step, whether its images are generated
    for epoch in range(epochs):
        order = draw.order(epoch)
        assert len(order) == length
        generated += [set(order[at : at + settings.batch] >= draw.real) for at in range(0, length, settings.batch)]
    turn = round(share * epochs * steps)
    assert generated == [{True}] * turn + [{False}] * (epochs * steps - turn)


def test_pretrain_gives_both_origins_the_same_class_prior(mixed, draws):
    draw = draws["pretrain"]
    for epoch in (0, 2):  # share 1/2 of 3 epochs: the first is all generated, the last all real
        counts = np.bincount(labels(draw, epoch), minlength=3)
        assert counts.max() - counts.min() <= 1, "the prior is balanced"
    assert (draw.order(0) >= draw.real).all() and (draw.order(2) < draw.real).all()


def test_without_a_mixable_image_every_arm_but_real_is_the_same(mixed):
    run, inputs = mixed

    class Without(Given):
        def table(self, role):  # one class has nothing accepted
            rows = super().table(role)
            return rows.assign(accepted=rows.accepted & (rows.label != 0)) if role == "labels" else rows

    scope = lineage.split_rows(inputs)
    found = [train._draw(run.config, Without(inputs, arm), scope) for arm in ARMS[1:]]
    assert [draw.generated for draw in found] == [0, 0, 0]
    assert all((draw.order(1) == found[0].order(1)).all() and draw.rows.key.tolist() == found[0].rows.key.tolist() for draw in found)


def trained(run, inputs: Inputs, folder: Path, **settings) -> dict[str, bytes]:
    """The files that the train stage makes of these inputs."""
    folder.mkdir()
    classifier = run.config.classifier.model_copy(update=settings)
    train.work(run.config.model_copy(update={"classifier": classifier}), inputs, Output(folder, Silent(), folder.parent / "logbook"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_training_looks_at_the_inner_validation_and_never_at_held_out_labels(mixed, tmp_path):
    """Plateau without patience and the best epoch kept: whatever labels they read decides the bytes."""
    run, inputs = mixed
    options = {"schedule": "plateau", "plateau_patience": 0, "keep": "best_inner", "epochs": 6, "learning_rate": 3e-3, "randaugment": 0}
    plain = trained(run, Given(inputs), tmp_path / "plain", **options)
    other_test = trained(run, Given(inputs, relabelled="held_out"), tmp_path / "held-out", **options)
    other_inner = trained(run, Given(inputs, relabelled="inner"), tmp_path / "inner", **options)
    assert set(plain) == {"model.safetensors", "config.json", "curve.json", "lineage.json"}
    assert other_test == plain
    assert other_inner["curve.json"] != plain["curve.json"] and other_inner["model.safetensors"] != plain["model.safetensors"]
    rows = json.loads(plain["curve.json"])
    judged = [row for row in rows if "validation_loss" in row]
    assert len(judged) == 6 and {"step", "loss", "learning_rate", "validation_loss", "validation_accuracy"} == set(judged[0])


def test_an_arm_and_a_teacher_train_where_one_image_is_left_over(mixed, tmp_path):
    """A model that norms pooled features takes no batch of one image."""
    run, inputs = mixed
    count = len(lineage.split_rows(inputs).training)
    batch = next(batch for batch in range(count // 2, 2, -1) if count % batch == 1)
    odd = {"model": "mobilenetv4_conv_small", "size_px": 32, "epochs": 1, "batch": batch, "head_hidden": 0, "schedule": "cosine"}
    assert "model.safetensors" in trained(run, Given(inputs), tmp_path / "arm", **odd)
    (tmp_path / "teacher").mkdir()
    config = run.config.model_copy(update={"classifier": run.config.classifier.model_copy(update=odd)})
    sure = teacher.train(config, inputs, Output(tmp_path / "teacher", Silent(), None), lineage.split_rows(inputs), after=0)
    assert 0 < sure <= 1.1


def test_other_weights_in_the_same_folder_are_other_work(mixed, tmp_path):
    run, _ = mixed
    began = run.config.classifier.model_copy(update={"weights": str(tmp_path)})
    found = set()
    for content in (b"one", b"other"):
        (tmp_path / "model.safetensors").write_bytes(content)
        models.fingerprint.cache_clear()
        other = Run(run.url, run.config.model_copy(update={"classifier": began}), read_only=True)
        found.add((models.fingerprints(other.config)["weights"], other.units("train")[0].identity))
    assert len({weights for weights, _ in found}) == len({identity for _, identity in found}) == 2


def test_predictions_tell_held_out_from_validation_and_answer_each_once(mixed):
    run, inputs = mixed
    scope = lineage.split_rows(inputs)
    for path in run.committed("evaluate"):
        rows = manifest.read(run.storage, path).to_pandas()
        assert rows.key.is_unique
        by_role = rows.groupby("role").key.apply(set)
        assert by_role.to_dict() == {"held-out": set(scope.held_out.key), "validation": set(scope.inner.key)}


def test_an_unlabelled_test_part_is_answered_all_the_same(mixed):
    """Every held-out image without label, index and points, as a test split without answers comes."""
    run, _ = mixed

    class Unlabelled(Inputs):
        def samples(self, role):
            rows = super().samples(role)
            hidden = rows.key.isin(lineage.split_rows(Inputs(self.storage, self._unit)).held_out.key)
            rows = rows.assign(label=rows.label.mask(hidden, -1).astype(int), index=rows["index"].mask(hidden))
            return rows.assign(points=rows.points.mask(hidden, None))

    for unit in run.units("evaluate"):
        before = manifest.read(run.storage, unit.marker).to_pandas().set_index("key")
        after = evaluate.work(run.config, Unlabelled(run.storage, unit), None).table.to_pandas().set_index("key")
        held_out = after.role == "held-out"
        assert (after.label[held_out] == -1).all() and after["index"][held_out].isna().all() and after.points[held_out].isna().all()
        assert (after.label[~held_out] == before.label[~held_out]).all()
        pd.testing.assert_series_equal(after.predicted, before.predicted)


@pytest.mark.slow
def test_a_vision_transformer_runs_the_debug_configuration(reference, tmp_path):
    run = tmp_path / "run"
    options = ("classifier.model=test_vit", "classifier.unfreeze=3", "arms=[real]")
    vhs("run", "debug/demo", *options, "--out", run, "--reuse", reference)
    (folder,) = [path.parent for path in run.glob("classifier/real/split/seed-0/*/model.safetensors")]
    assert json.loads((folder / "config.json").read_text())["model"] == "test_vit"
    summary = json.loads(next(run.glob("report/*/summary.json")).read_text())
    assert 0 <= summary["arms"]["real"]["test"]["accuracy"] <= 1


STEP = """
import resource, torch
from accelerate import Accelerator
from vhs import augmentation, checkpoint, training
from vhs.networks import build_classifier
from vhs.settings import Classifier
torch.set_num_threads(1)
study = Classifier(weights="scratch", unfreeze=3, schedule="plateau", randaugment=9, class_weights="balanced")
model = build_classifier(study)
frozen = model.net.blocks[0][0].conv_dw.weight.clone()
head = model.net.conv_head.weight.clone()
images = torch.randint(0, 256, (2, 1, 512, 512), dtype=torch.uint8)
batch = {"image": images, "label": torch.tensor([0, 2]), "weight": torch.ones(2), "total": 2, "key": ["a", "b"]}
accelerator = Accelerator(cpu=True)
model = training.fit(
    model, training.cross_entropy(0.0, [1.0, 1.0, 1.0]), lambda epoch, start: iter([batch]), steps=1, steps_per_epoch=1,
    learning_rate=study.learning_rate, weight_decay=study.weight_decay, accelerator=accelerator, progress=checkpoint.Silent(), seed=0,
    augment=augmentation.for_classifier(study, (0, 1, 2, 3, 4, 5)), size_px=study.size_px,
    validate=training.inner_validation(lambda: iter([batch]), {"a": 0, "b": 2}, accelerator, study.size_px),
    plateau={"patience": study.plateau_patience, "factor": study.plateau_factor},
)
assert torch.equal(model.net.blocks[0][0].conv_dw.weight, frozen) and not torch.equal(model.net.conv_head.weight, head)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_a_step_of_the_studys_classifier_fits_a_laptop(figure):
    """tf_efficientnet_b7, 600 x 600, batch 2, the study's settings: one training step and one validation in a process of its own."""
    process = subprocess.run([sys.executable, "-c", STEP], cwd=ROOT, text=True, capture_output=True)
    assert process.returncode == 0, process.stderr
    peak_gb = float(process.stdout.split()[-1])
    figure(f"one tf_efficientnet_b7 step at 600 px, batch 2: peak {peak_gb:.1f} GiB of memory")
    assert peak_gb <= 12

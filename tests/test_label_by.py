"""Who labels the generated images: the measurement, the prompt, a teacher, a person."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from conftest import committed, vhs

from jobs import config, interrupt, labels, plan, teacher
from jobs.attempt import Inputs, attempt
from jobs.drive import drive
from jobs.generators import DREAMBOOTH
from jobs.stages import report
from vhs.measure import CLASSES


class Labelled(Inputs):
    """The generated images and labels of a run, as the report reads them."""

    def __init__(self, run):
        named = {role: run.committed(stage) for role, stage in (("generated", "generate"), ("labels", "label"))}
        super().__init__(run.storage, run.unit("report", "report", named))


def labelled(reference, out, *overrides):
    """A run like the reference up to its labels, which are made by other means."""
    run = plan.start(config.load("debug/demo", list(overrides)), str(out))
    drive(run, reuse=str(reference), only="label")
    return run


def test_the_prompted_class_can_be_the_label(reference, tmp_path):
    run = labelled(reference, tmp_path / "run", "label_by=prompt")
    rows, measured = labels.table(run), labels.table(plan.reopen(str(reference), read_only=True)).set_index("key")
    assert (rows.label == rows.prompted.map(CLASSES.index)).all() and set(rows.label_source) == {"prompt"}
    assert (rows.accepted == (rows.reason == "")).all() and set(rows.reason) <= {"", "near-copy"}
    generated = report._generated(run.config, Labelled(run), DREAMBOOTH)
    assert (generated.label == generated.prompted).all() and (generated.measured == run.config.measure.classify(generated["index"])).all()
    assert (generated.measured != generated.prompted).any(), "the page's agreement is the measurement's, not the prompt's with itself"
    shared = rows[rows.key.isin(measured.index)].set_index("key")
    assert np.allclose(shared["index"], measured.loc[shared.index, "index"]) and len(shared) > 8  # measured all the same


def test_a_teacher_learns_from_the_scopes_training_images_alone(reference, tmp_path):
    run = labelled(reference, tmp_path / "run", "label_by=teacher", "classifier.epochs=1")
    facts = run.marker(run.committed("labeller", scope="split")[0]).facts
    lineage = plan.reopen(str(reference)).marker(plan.reopen(str(reference)).committed("labeller", scope="split")[0]).facts
    assert facts["patients_seen"] == lineage["patients_seen"] and 0 < facts["teacher_confidence"] <= 1.1
    rows = labels.table(run)
    assert set(rows.label_source) == {"teacher"} and set(rows.reason) <= {"", "near-copy", "teacher unsure"}


def loops(run, stop_at: int | None = None) -> list[list[int]]:
    """One attempt at the run's labeller with the real Progress -> the steps it took, loop by loop. It is asked to stop at the `stop_at`th of the second."""
    totals, steps = [], []

    def watch(path: str, step: int, total: int, metrics: dict):
        if total not in totals:
            totals.append(total), steps.append([])
        steps[-1].append(step)
        if len(totals) == 2 and len(steps[-1]) == stop_at:
            interrupt.asked.set()

    (unit,) = run.units("labeller")
    try:
        attempt(run.url, run.config, unit, watch)
        assert stop_at is None
    except interrupt.Interrupted:
        assert stop_at
    finally:
        interrupt.asked.clear()
    return steps


def test_a_labeller_stopped_in_its_teacher_goes_on_in_it(reference, tmp_path):
    """The teacher has taken fewer steps, when it is stopped, than the key points' last checkpoint. It still is the newest."""
    runs = {}
    for name in ("undisturbed", "stopped"):
        runs[name] = plan.start(config.load("debug/demo", ["label_by=teacher", "classifier.epochs=3"]), str(tmp_path / name))
        drive(runs[name], reuse=str(reference), only="split")
    points, whole = loops(runs["undisturbed"])
    assert len(points) == 6 and len(whole) >= 8, "the first loop leaves a checkpoint of its step 4"
    once, twice, rest = (loops(runs["stopped"], stop)[1] for stop in (2, 3, None))
    assert once + twice + rest == whole
    assert committed(tmp_path / "stopped") == committed(tmp_path / "undisturbed")


def test_a_labeller_depends_on_what_its_teacher_uses_alone(reference, tmp_path):
    """The arms' schedule and weights are none of its business, and what it leaves behind does not claim them."""
    run = labelled(reference, tmp_path / "run", "label_by=teacher", "classifier.epochs=1")
    (file,) = (tmp_path / "run" / "labeller").glob("**/teacher/config.json")
    said, asked = json.loads(file.read_text()), run.config.classifier
    assert (asked.schedule, asked.keep, asked.class_weights) == ("plateau", "best_inner", "balanced")
    assert (said["schedule"], said["keep"], said["class_weights"]) == ("cosine", "last", "none") and said["model"] == asked.model

    def identity(*overrides: str) -> str:
        other = plan.start(config.load("debug/demo", ["label_by=teacher", "classifier.epochs=1", *overrides]), str(tmp_path / overrides[0]))
        drive(other, reuse=str(reference), only="split")
        (unit,) = other.units("labeller")
        return unit.identity

    (own,) = (unit.identity for unit in run.units("labeller"))
    assert identity("classifier.keep=last", "classifier.schedule=cosine", "classifier.class_weights=none", "classifier.pretrain_share=0.3") == own
    assert identity("classifier.learning_rate=0.1") != own


def test_a_teacher_is_believed_where_nine_of_ten_were_right():
    confidence, right = np.array([0.99, 0.9, 0.8, 0.7, 0.6]), np.array([True, True, True, False, True])
    assert teacher.least_confidence(confidence, right) == 0.8
    assert teacher.least_confidence(confidence, np.ones(5, bool)) == 0.6
    assert teacher.least_confidence(confidence, np.zeros(5, bool)) > 1


def test_by_hand_nothing_is_accepted_and_the_run_waits_for_a_person(reference, tmp_path):
    run, file = tmp_path / "run", tmp_path / "l.csv"
    labelled(reference, run, "label_by=hand", "generation.max_rounds=1")
    said = " ".join(vhs("run", "debug/demo", "label_by=hand", "generation.max_rounds=1", "--out", run, code=1).split())
    assert "wait for a person" in said and "vhs labels" in said
    vhs("labels", run, "export", tmp_path / "asked.mat", "--most-uncertain", 3)
    assert "nothing in it differs" in " ".join(vhs("labels", run, "import", tmp_path / "asked.mat").split()), "who says neither yes nor no has not judged"
    vhs("labels", run, "export", file)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["accepted"], row["looked_at"]) for row in rows} == {("", "")}
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader(), writer.writerows(row | {"accepted": "yes"} for row in rows[:5])
    vhs("labels", run, "import", file)
    vhs("run", "debug/demo", "label_by=hand", "generation.max_rounds=1", "--out", run)
    assert json.loads((run / "report" / "summary.json").read_text())["generated"]["accepted"] == 5


@pytest.mark.slow
def test_a_person_who_rejects_everything_has_judged_it(reference, tmp_path):
    run, file = tmp_path / "run", tmp_path / "l.csv"
    opened = labelled(reference, run, "label_by=hand", "generation.max_rounds=1")
    keys = labels.table(opened).key
    file.write_text("key,accepted\n" + "".join(f"{key},no\n" for key in keys))
    assert labels.take(opened, file) == labels.Taken(len(keys), 0) and len(keys) > 0
    vhs("run", "debug/demo", "label_by=hand", "generation.max_rounds=1", "--out", run)
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["generated"]["accepted"] == 0 and summary["paired"] is None


def test_classes_without_points_are_asked_about_before_anything_is_made(real_data, tmp_path):
    with (real_data / "ctr" / "labels.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))[:24]
    (tmp_path / "data").mkdir()
    for row in rows:
        shutil.copy(next(real_data.glob(f"ctr/**/{row['file'].rpartition('/')[2]}")), tmp_path / "data")
    with (tmp_path / "data" / "labels.csv").open("w") as out:
        out.write("file,class\n" + "".join(f"{row['file'].rpartition('/')[2]},{CLASSES[n % 3]}\n" for n, row in enumerate(rows)))
    run = tmp_path / "run"
    said = " ".join(vhs("run", "debug/ctr", f"data={tmp_path / 'data'}", "--out", run, code=1).split())
    for choice in ("no key points", "labeller.steps=0", "label_by=prompt", "label_by=teacher", "label_by=hand"):
        assert choice in said
    assert not (run / "plan.json").exists()
    for override in ("labeller.steps=0", "label_by=prompt"):
        assert "a new run" in vhs("run", "debug/ctr", f"data={tmp_path / 'data'}", override, "--out", run, "--dry-run")


@pytest.mark.parametrize("word", ["machine", "person"])
def test_an_unknown_labeller_is_named(word):
    with pytest.raises(config.ConfigError, match="label_by"):
        config.load("debug/demo", [f"label_by={word}"])

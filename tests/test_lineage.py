"""The leak guard refuses by name, and says nothing on a clean run."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from jobs import lineage
from jobs.lineage import LeakError, guard
from jobs.plan import reopen
from shards import manifest

ROWS = pd.DataFrame({"key": ["k1", "k2", "k3"], "generator": ["g1", "g1", "g2"], "labeller": ["l1", "l1", "l1"]})
CLEAN = {"g1": {"patients_seen": ["ann", "bob"]}, "g2": {"patients_seen": ["bob"]}, "l1": {"patients_seen": ["ann"]}}
HELD_OUT = SimpleNamespace(held_out_patients=frozenset({"eve", "dan"}), held_out_keys=frozenset({"e1", "d1", "d2", "d3"}))


def test_it_is_silent_on_clean_lineages():
    guard(ROWS, CLEAN, HELD_OUT)
    guard(ROWS.head(0), {}, HELD_OUT)


@pytest.mark.parametrize(("maker", "role", "key"), [("g2", "generator", "k3"), ("g1", "generator", "k1"), ("l1", "labeller", "k1")])
def test_a_maker_that_saw_a_held_out_patient_is_refused_by_name(maker, role, key):
    leaking = {**CLEAN, maker: {"patients_seen": ["ann", "eve"]}}
    with pytest.raises(LeakError, match=f"{key}.*{role} {maker} was trained on held-out patient eve"):
        guard(ROWS, leaking, HELD_OUT)


@pytest.mark.parametrize(("maker", "role", "key"), [("g2", "generator", "k3"), ("g1", "generator", "k1"), ("l1", "labeller", "k1")])
def test_a_maker_that_saw_a_held_out_image_is_refused_by_key_whatever_its_patient_was_called(maker, role, key):
    """An earlier run's maker: the data named no patients then, so it recorded groups."""
    known = {name: {"patients_seen": ["group-a1"], "keys_seen": ["a1", "b1"]} for name in CLEAN}
    guard(ROWS, known, HELD_OUT)
    with pytest.raises(LeakError, match=f"{key}.*{role} {maker} was trained on held-out image d1, d2, d3 \\(and 1 more\\)"):
        guard(ROWS, {**known, maker: {"patients_seen": ["group-a1"], "keys_seen": ["a1", "e1", "d2", "d1", "d3"]}}, HELD_OUT)
    with pytest.raises(LeakError, match=r"on held-out patient dan \(and 0 more\) and held-out image d1 \(and 0 more\)"):
        guard(ROWS, {**known, maker: {"patients_seen": ["dan"], "keys_seen": ["d1"]}}, HELD_OUT)


def test_makers_that_recorded_no_keys_are_taken_by_their_patients():
    """What was written before keys were recorded, or by others: neither refused for it, nor lost when a classifier passes its makers' records on."""
    rows = pd.DataFrame({"key": ["a1"], "patient": ["ann"]})
    assert lineage.seen(rows, {"patients_seen": ["bob"]}) == {"keys_seen": ["a1"], "patients_seen": ["ann", "bob"]}
    assert lineage.leaked({"patients_seen": ["bob"]}, HELD_OUT) == "" != lineage.leaked({"patients_seen": ["dan"]}, HELD_OUT)


@pytest.mark.parametrize("records", [{k: v for k, v in CLEAN.items() if k != "g2"}, {**CLEAN, "g2": {}}])
def test_an_image_without_lineage_is_refused_by_name(records):
    with pytest.raises(LeakError, match="k3.*no lineage.*generator 'g2'"):
        guard(ROWS, records, HELD_OUT)


def test_a_missing_maker_is_no_lineage():
    with pytest.raises(LeakError, match="k2.*no lineage"):
        guard(ROWS.assign(labeller=["l1", None, "l1"]), CLEAN, HELD_OUT)


@pytest.fixture(scope="module")
def mixed(reference):
    """The finished debug run, and the inputs its mixed arm had."""
    from jobs.attempt import Inputs

    run = reopen(str(reference))
    (unit,) = [unit for unit in run.units("train") if unit.params["arm"] == "mixed"]
    return run, Inputs(run.storage, unit)


def test_a_real_run_is_clean_and_its_makers_recorded_what_they_saw(mixed):
    run, inputs = mixed
    scope = lineage.split_rows(inputs)
    for role, rows in (
        ("generator", scope.training),
        ("labeller", pd.concat([scope.training, scope.inner])),
    ):  # the labeller's thresholds see inner too
        facts = inputs.facts(role)
        assert set(facts["keys_seen"]) == set(rows.key) and set(facts["patients_seen"]) == set(rows.patient)
        assert not scope.held_out_patients & set(facts["patients_seen"])
    generated = inputs.samples("generated").merge(inputs.table("labels"), on="key")
    assert len(generated) > 0
    guard(generated, {m.path: m.facts for role in ("generator", "labeller") for m in inputs.markers(role)}, scope)
    assert scope.held_out_keys == set(scope.held_out.key)


def test_training_itself_refuses_a_planted_leak(mixed, tmp_path):
    """The same inputs, but the generator's record names a test patient: the train stage must stop before it trains."""
    from jobs.stages import train

    run, inputs = mixed
    leaked = sorted(lineage.split_rows(inputs).held_out_patients)[0]

    class Planted(type(inputs)):
        def markers(self, role):
            found = super().markers(role)
            return (
                [SimpleNamespace(**{**vars(m), "facts": {**m.facts, "patients_seen": [*m.facts["patients_seen"], leaked]}}) for m in found]
                if role == "generator"
                else found
            )

        def table(self, role):  # every image accepted, so that there is something to refuse
            found = super().table(role)
            return found.assign(accepted=True) if role == "labels" else found

    planted = Planted(inputs.storage, inputs._unit)
    with pytest.raises(LeakError, match=f"held-out patient {leaked}"):
        train.work(run.config, planted, None)


def test_a_classifier_that_saw_a_held_out_patient_is_no_beginning(mixed, tmp_path):
    """A classifier's folder says whom it saw, and training that begins with it heeds that."""
    from jobs.stages import train

    run, inputs = mixed
    scope, facts = lineage.split_rows(inputs), inputs.facts("generator")
    (folder,) = [marker.folder for marker in [run.marker(inputs._unit.marker)]]
    said = json.loads(run.storage.read(f"{folder}/lineage.json"))
    assert set(said["patients_seen"]) == {*scope.training.patient, *scope.inner.patient, *facts["patients_seen"]}
    leaked = sorted(scope.held_out_patients)[0]
    (tmp_path / "lineage.json").write_text(json.dumps({"keys_seen": [], "patients_seen": [leaked]}))
    began = run.config.classifier.model_copy(update={"weights": str(tmp_path)})
    with pytest.raises(LeakError, match=f"classifier.weights.*held-out patient {leaked}"):
        train.work(run.config.model_copy(update={"classifier": began}), inputs, None)
    key = sorted(scope.held_out.key)[0]
    (tmp_path / "lineage.json").write_text(json.dumps({"keys_seen": [key], "patients_seen": ["group-0"]}))
    with pytest.raises(LeakError, match=f"classifier.weights.*held-out image {key}"):
        train.work(run.config.model_copy(update={"classifier": began}), inputs, None)


def test_held_out_images_are_in_no_training_input(mixed):
    run, inputs = mixed
    scope = lineage.split_rows(inputs)
    splits = manifest.read(run.storage, run.committed("split")[0]).to_pandas()
    test = set(splits.key[splits.part == "test"])
    assert test and test == set(scope.held_out.key)
    assert not test & (set(scope.training.key) | set(scope.inner.key)) and not set(scope.training.key) & set(scope.inner.key)


def test_a_labeller_is_not_judged_on_patients_it_saw(mixed):
    """Without generated images too: the arm measure refuses a labeller whose record names a held-out patient, and takes the run's own."""
    from jobs.attempt import Inputs
    from jobs.stages import evaluate

    run, _ = mixed
    (unit,) = [unit for unit in run.units("evaluate") if unit.params["arm"] == "measure"]
    inputs = Inputs(run.storage, unit)
    scope, (labeller,) = lineage.split_rows(inputs), inputs.markers("labeller")
    lineage.guard_labeller(labeller, scope)
    leaked = sorted(scope.held_out_patients)[0]

    class Planted(Inputs):
        def markers(self, role):
            found = super().markers(role)
            return [replace(m, facts={**m.facts, "patients_seen": [leaked]}) for m in found] if role == "labeller" else found

    with pytest.raises(LeakError, match=f"measure leaks.*held-out patient {leaked}"):
        evaluate.work(run.config, Planted(run.storage, unit), None)
    key = sorted(scope.held_out_keys)[0]
    renamed = replace(labeller, facts={**labeller.facts, "patients_seen": ["group-0"], "keys_seen": [key]})
    with pytest.raises(LeakError, match=f"measure leaks.*held-out image {key}"):
        lineage.guard_labeller(renamed, scope)
    lineage.guard_labeller(replace(renamed, facts={**renamed.facts, "keys_seen": labeller.facts["keys_seen"]}), scope)

"""The arm source: what may be known of an image's class without looking at it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import vhs

from jobs import lineage, plan
from jobs.attempt import Inputs
from jobs.stages import evaluate
from shards import manifest
from vhs.measure import CLASSES

TRAINING = [("north", 0), ("north", 0), ("north", 1), ("south", 2), ("south", 2), ("south", 2), ("south", 1)]


def inputs(labels_elsewhere: int = 1) -> SimpleNamespace:
    """Of a scope: TRAINING, an inner image a source, and test images of north, south and of a source that nobody trained on, all of one label."""
    where = ["north", "south"], ["north", "south", "east"]
    rows = TRAINING + [(source, labels_elsewhere) for part in where for source in part]
    table = pd.DataFrame(rows, columns=["source", "label"])
    table["key"] = table["patient"] = [f"{n:02d}" for n in range(len(rows))]
    table["part"], table["fold"] = ["train"] * (len(TRAINING) + 2) + ["test"] * 3, -1
    table["inner_split"] = [False] * len(TRAINING) + [True] * 2 + [False] * 3
    real = table[["key", "patient", "source", "label"]]
    return SimpleNamespace(params={"arm": "source", "scope": "split"}, table=lambda role: table, samples=lambda role: real)


def test_it_says_the_class_that_most_training_images_of_the_source_have():
    given = inputs()
    found = evaluate._by_source(None, given, lineage.split_rows(given).held_out)
    assert found.predicted.tolist() == [0, 2, 2], "of the three test images; nobody trained on the last one's source, so all training images speak"
    np.testing.assert_allclose(found[[f"p_{name}" for name in CLASSES]], [[2 / 3, 1 / 3, 0], [0, 1 / 4, 3 / 4], [2 / 7, 2 / 7, 3 / 7]])


def test_labels_that_it_may_not_know_change_nothing():
    answers = [evaluate._by_source(None, given := inputs(label), lineage.split_rows(given).held_out) for label in range(3)]
    assert answers[0].equals(answers[1]) and answers[0].equals(answers[2])


@pytest.fixture(scope="module")
def run(reference, tmp_path_factory):
    out = tmp_path_factory.mktemp("source") / "run"
    vhs("run", "debug/demo", "arms=[real,real-matched,mixed,source]", "--out", out, "--reuse", reference)
    return out


def test_it_is_judged_beside_the_others_on_the_same_images(run):
    opened = plan.reopen(str(run))
    (path,) = opened.committed("evaluate", arm="source")
    rows = manifest.read(opened.storage, path).to_pandas()
    training = lineage.split_rows(Inputs(opened.storage, opened.units("evaluate")[0])).training
    assert rows.source.nunique() == 1 and set(rows.predicted) == {training.label.mode()[0]}, "one source: the class that most training images have"
    other = manifest.read(opened.storage, opened.committed("evaluate", arm="real")[0]).to_pandas()
    assert set(zip(rows.key, rows.role)) == set(zip(other.key, other.role))
    tested = rows[rows.role == "held-out"]
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["arms"]["source"]["test"]["accuracy"] == pytest.approx((tested.predicted == tested.label).mean())


def test_what_images_tell_beyond_their_source_is_among_the_differences(run):
    summary = json.loads((run / "report" / "summary.json").read_text())
    found = {" - ".join(pair["arms"]): pair["difference"] for pair in summary["differences"]}
    assert list(found) == ["mixed - real-matched", "mixed - real", "real - source", "mixed - source"]
    assert json.loads((run / "plan.json").read_text())["analysis"]["differences"] == list(found)[:2], "a plan is what it was"
    right = {arm: figures["test"]["accuracy"] for arm, figures in summary["arms"].items()}
    assert found["real - source"] == pytest.approx(right["real"] - right["source"])
    assert "what images tell beyond where they come from" in (run / "report" / "index.html").read_text()

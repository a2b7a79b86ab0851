from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from vhs import metrics
from vhs.arms import PRIMARY
from vhs.measure import CLASSES, VIEWS

few = hypothesis_settings(max_examples=25, deadline=None)


def answers(correct, arm="mixed", seed=0, patient=None, scope="split", label=None, source="here", index=np.nan, role="held-out"):
    """Predictions with the given correctness, image by image; a wrong answer is the next class, of probability 0.6."""
    n = len(correct)
    label = np.arange(n) % 3 if label is None else np.asarray(label)
    predicted = np.where(np.asarray(correct, dtype=bool), label, (label + 1) % 3)
    probability = np.where(np.eye(3)[predicted] > 0, 0.6, 0.2)
    return pd.DataFrame({
        "key": [f"{i:016x}" for i in range(n)], "arm": arm, "scope": scope, "seed": seed, "role": role, "patient": patient,
        "source": source, "label": label, "predicted": predicted, "index": index,
        **{f"p_{name}": probability[:, i] for i, name in enumerate(CLASSES)},
    })


def arms(first, second, **options) -> pd.DataFrame:
    return pd.concat([answers(first, "mixed", **options), answers(second, "real-matched", **options)], ignore_index=True)


def simulated(rng, n, images_per_patient=1, seeds=1, p=0.8) -> pd.DataFrame:
    """Two equally good arms: images share a difficulty, images of a patient more so."""
    owner = np.arange(n) // images_per_patient
    difficulty = np.sqrt(0.5) * rng.normal(size=n)[owner] + np.sqrt(0.5) * rng.normal(size=n)
    parts = []
    for arm in PRIMARY:
        for seed in range(seeds):
            correct = np.sqrt(0.7) * difficulty + np.sqrt(0.3) * rng.normal(size=n) < norm.ppf(p)
            parts.append(answers(correct, arm, seed, [f"p{i}" for i in owner]))
    return pd.concat(parts, ignore_index=True)


def scored(seed: int, n: int = 60) -> pd.DataFrame:
    """Predictions with random probabilities that lean towards the truth."""
    rng, label = np.random.default_rng(seed), np.arange(n) % 3
    probability = rng.dirichlet([1, 1, 1], n) + 0.7 * np.eye(3)[label]
    probability /= probability.sum(1, keepdims=True)
    rows = answers(np.ones(n), label=label).assign(predicted=probability.argmax(1))
    return rows.assign(**{f"p_{name}": probability[:, i] for i, name in enumerate(CLASSES)})


def test_auroc_is_the_mean_over_classes_and_seeds():
    rows = [scored(0).assign(seed=0), scored(1).assign(seed=1)]
    want = [np.mean([roc_auc_score(part.label == i, part[f"p_{name}"]) for i, name in enumerate(CLASSES)]) for part in rows]
    assert metrics.auroc(pd.concat(rows)) == pytest.approx(np.mean(want))
    assert metrics.auroc(rows[0][rows[0].label != 2]) is None and metrics.auroc(rows[0].assign(seed=metrics.NO_SEED)) is None


def test_calibration_error_by_hand():
    # two bins: 4 images of confidence 0.6 of which 1 is right, 2 of confidence 0.9 that are both right
    rows = answers([1, 0, 0, 0, 1, 1])
    assert metrics.calibration_error(rows[:4]) == pytest.approx(0.35)
    sure = rows[4:].assign(**{f"p_{name}": np.where(rows[4:].predicted == i, 0.9, 0.05) for i, name in enumerate(CLASSES)})
    assert metrics.calibration_error(pd.concat([rows[:4], sure])) == pytest.approx((4 * 0.35 + 2 * 0.1) / 6)
    assert metrics.calibration_error(rows.assign(seed=metrics.NO_SEED)) is None


@few
@given(st.integers(0, 10**6), st.integers(1, 80))
def test_calibration_error_is_a_fraction(seed, n):
    assert 0 <= metrics.calibration_error(scored(seed, n)) <= 1


def test_calibrated_probabilities_have_a_small_error():
    rng, n = np.random.default_rng(0), 20000
    probability = rng.dirichlet([2, 1, 1], n)
    label = (rng.random((n, 1)) > probability.cumsum(1)).sum(1)
    rows = answers(np.ones(n), label=label).assign(predicted=probability.argmax(1))
    rows = rows.assign(**{f"p_{name}": probability[:, i] for i, name in enumerate(CLASSES)})
    assert metrics.calibration_error(rows) < 0.02 < metrics.calibration_error(rows.assign(predicted=(rows.predicted + 1) % 3))


def found(paired: dict | None, purpose: str = "confirmatory", judged: bool = True, arms=("real-matched", "mixed")) -> dict:
    """A summary as far as the verdict reads it."""
    arm = {"test": {"accuracy": 0.5} if judged else None, "validation": None, "cv": None, "seeds": [0]}
    return {"paired": paired, "purpose": purpose, "arms": dict.fromkeys(arms, arm)}


@pytest.mark.parametrize(("paired", "sentence"), [
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 3},
     "Generation helped: +6.3 points [1.2, 11.0]; this test set would find 7.0 points four times in five"),
    ({"from": "test", "difference": 0.010, "ci95": [-0.042, 0.063], "seeds": 3},
     "No difference could be shown: +1.0 points [-4.2, 6.3]; this test set would find 7.5 points four times in five"),
    ({"from": "test", "difference": 0.010, "ci95": [-0.042, 0.063], "seeds": 2, "from_trainings": 0.9},
     "No difference could be shown: +1.0 points [-4.2, 6.3]; this test set would find 7.5 points four times in five; most of that is how trainings differ: "
     "more seeds would tell, not more images"),
    ({"from": "test", "difference": -0.08, "ci95": [-0.12, -0.031], "seeds": 3},
     "Generation hurt: -8.0 points [-12.0, -3.1]; this test set would find 6.4 points four times in five"),
    ({"from": "cv", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 3},
     "Generation helped: +6.3 points [1.2, 11.0] out of fold, for the test part lacks labels; these folds would find 7.0 points four times in five"),
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 1},
     "Descriptive: generation helped: +6.3 points [1.2, 11.0]; this test set would find 7.0 points four times in five; each arm was trained once, and what "
     "another training would say is not in it"),
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11]},  # of a former version's run
     "Generation helped: +6.3 points [1.2, 11.0]; this test set would find 7.0 points four times in five"),
    (None, "No verdict: no generated image could be mixed in, so mixed and real-matched are one training"),
])
def test_verdict(paired, sentence):
    assert metrics.verdict(found(paired)) == sentence
    said = sentence.removeprefix("Descriptive: ")
    assert metrics.verdict(found(paired, "descriptive")) == f"Descriptive: {said[0].lower()}{said[1:]}"


def test_why_there_is_no_verdict():
    assert metrics.verdict(found(None, judged=False)) == "No verdict: the test part has no labels and no folds were run"
    for arms_there in (("real-matched", "null", "oracle"), ("real",)):
        assert metrics.verdict(found(None, arms=arms_there)) == "No verdict: none was planned, for mixed is not among the arms of this run"


def test_joined_once_orders_and_names_what_is_wrong():
    predictions = pd.concat([answers([1, 0, 1], seed=1), answers([1, 1, 1], seed=0)])
    keys = list(predictions.key[:3])
    joined = metrics.joined_once(predictions.iloc[::-1], keys)
    assert joined.seed.tolist() == [0, 0, 0, 1, 1, 1] and joined.key.tolist() == keys * 2
    bad = pd.concat([predictions.iloc[1:], predictions.iloc[[1]], answers([1, 1, 1, 1]).iloc[[3]].assign(seed=1)])
    wrong = f"1 more than once ({keys[1]}); 1 not at all ({keys[0]}); 1 without being asked (0000000000000003) of 3 keys"
    with pytest.raises(ValueError, match=re.escape(f"arm mixed, seed 1 answers {wrong}")):
        metrics.joined_once(bad, keys)


def test_near_boundary_and_tables_by_hand():
    view = VIEWS["canine_lateral"]  # edges 8.2 and 10, bins of 0.5
    predictions = answers([1, 0, 1, 1, 0], index=[7.0, 8.6, 10.5, 9.1, np.nan], label=[0, 1, 2, 1, 0], source=["a", "a", "a", "b", "b"])
    zones = metrics.near_boundary(predictions, view)
    assert zones[["zone", "images", "accuracy"]].to_numpy().tolist() == [["within 0.5 VHS of an edge", 2, 0.5], ["farther away", 2, 1.0]]
    tables = metrics.tables(predictions, view)
    assert tables["by_source"].accuracy.tolist() == pytest.approx([2 / 3, 1 / 2]) and tables["by_class"]["class"].tolist() == list(CLASSES)
    assert tables["by_class"].accuracy.tolist() == [0.5, 0.5, 1.0]
    assert tables["confusion"][list(CLASSES)].to_numpy().tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert tables["by_seed"].images.tolist() == [5] and metrics.tables(predictions.assign(seed=metrics.NO_SEED), view)["by_seed"].empty


def test_confusion_is_the_mean_over_seeds():
    matrix = metrics.confusion(pd.concat([answers([1, 1, 1], seed=0), answers([0, 1, 1], seed=1)]))
    assert matrix[list(CLASSES)].to_numpy().tolist() == [[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1]]


def test_generated_figures():
    generated = pd.DataFrame({
        "prompted": [0, 0, 1, 2, 2], "measured": [0, 1, 1, 2, 0], "accepted": [True, True, False, False, False],
        "reason": ["", "", "spread", "implausible geometry", "spread"],
    })
    assert metrics.generated_counts(generated, asked=6) == {"asked": 6, "produced": 5, "accepted": 2, "agreement": 0.6}
    assert metrics.generated_counts(generated[:0], asked=6)["agreement"] is None
    tables = metrics.generated_tables(generated)
    rejections = tables["rejections"].set_index("measured class")
    assert list(rejections.index) == list(CLASSES) and list(rejections.columns) == ["accepted", "implausible geometry", "spread"]
    assert rejections.to_numpy().tolist() == [[1, 0, 1], [1, 0, 1], [0, 1, 0]]
    assert tables["agreement"][list(CLASSES)].to_numpy().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_an_image_without_a_measured_class_is_counted_as_such():
    generated = pd.DataFrame({"prompted": [0, 1], "measured": [-1, 1], "accepted": [False, True], "reason": ["implausible geometry", ""]})
    tables = metrics.generated_tables(generated)
    assert tables["rejections"].set_index("measured class").loc["none"].tolist() == [0, 1]
    assert tables["agreement"].set_index("prompted class")["none"].tolist() == [1, 0, 0]


@few
@given(st.lists(st.tuples(st.floats(3, 17), st.booleans()), min_size=1, max_size=40), st.sampled_from(sorted(VIEWS)))
def test_bins_of_the_index_lose_no_plausible_image(images, name):
    view = VIEWS[name]
    low, high = view.plausible
    index = np.array([low + (value - 3) / 14 * (high - low) for value, _ in images])
    bins = metrics.generated_by_index(pd.DataFrame({"index": index, "accepted": [accepted for _, accepted in images]}), view)
    assert bins.produced.sum() == len(images) and bins.accepted.sum() == sum(accepted for _, accepted in images)
    assert (bins.accepted <= bins.produced).all() and np.allclose(np.diff(bins.low), view.bin_width)
    for row in bins.itertuples():
        assert ((index >= row.low - 1e-6) & (index < row.high + 1e-6)).sum() >= row.produced


def test_bins_of_the_index_by_hand():
    index = [0.42, 0.43, 0.44, 0.50, np.nan, np.inf, 7.0]  # 0.42 / 0.02 is a little less than 21 in floating point
    bins = metrics.generated_by_index(pd.DataFrame({"index": index, "accepted": [True, False, True, True, False, False, False]}), VIEWS["human_frontal"])
    assert bins.low.tolist() == [0.42, 0.44, 0.46, 0.48, 0.5] and bins.high.tolist() == [0.44, 0.46, 0.48, 0.5, 0.52]
    assert bins.produced.tolist() == [2, 1, 0, 0, 1] and bins.accepted.tolist() == [1, 1, 0, 0, 1]
    assert metrics.generated_by_index(pd.DataFrame({"index": [np.nan], "accepted": [False]}), VIEWS["human_frontal"]).empty


FIGURES = {"accuracy", "ci95", "balanced_accuracy", "balanced_ci95", "auroc", "ece", "images", "patients"}


def test_summary_has_the_documented_shape():
    predictions = pd.concat([
        answers([1, 1, 0, 1], "real"), answers([1, 1, 0, 1], "real", seed=1), arms([1, 1, 1, 1], [1, 1, 0, 0]), arms([1, 1, 1, 1], [1, 1, 0, 0], seed=1),
        answers([1, 0, 1], "real", role="validation").assign(key=["v", "w", "x"]),
        answers([1, 1, 0, 1], "measure", seed=metrics.NO_SEED),
        answers([1, 0], "real", scope="fold-0"), answers([1, 1], "real", scope="fold-1").assign(key=["a", "b"]),
    ])
    found = metrics.summary(predictions, generated={"asked": 4, "produced": 3, "accepted": 2, "agreement": 0.5})
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {
        "purpose", "corrected", "patients_known", "unlabelled", "arms", "paired", "differences", "labeller", "generated", "generators", "likeness"
    }  # fmt: skip
    assert list(found["arms"]) == ["real", "real-matched", "mixed", "measure"] and found["unlabelled"] == 0
    real, measure = found["arms"]["real"], found["arms"]["measure"]
    assert set(real) == {"test", "validation", "cv", "seeds"} and set(real["test"]) == set(real["validation"]) == FIGURES
    assert (real["test"]["accuracy"], real["validation"]["accuracy"], real["cv"]["accuracy"]) == (0.75, pytest.approx(2 / 3), 0.75)
    assert real["cv"]["folds"] == 2 and set(real["cv"]) == FIGURES | {"folds"} and found["arms"]["mixed"]["cv"] is None
    assert found["arms"]["mixed"]["validation"] is None and found["arms"]["mixed"]["seeds"] == [0, 1]
    assert measure["seeds"] == [] and measure["test"]["auroc"] is None and measure["test"]["ece"] is None
    assert found["paired"] == {"from": "test", "arms": ["mixed", "real-matched"], "images": 4, "patients": 4, "seeds": 2} | {
        name: found["paired"][name] for name in ("difference", "ci95", "from_trainings")
    }
    assert found["paired"]["difference"] == 0.5
    assert metrics.summary(predictions[predictions.arm != "mixed"])["paired"] is None
    assert metrics.summary(predictions, unmixed=[("mixed", "split")])["paired"] is None
    assert metrics.summary(predictions, unmixed=[("mixed", "fold-0"), ("base", "split")])["paired"]


def test_a_test_part_without_labels_is_judged_out_of_fold():
    folds = [arms([1, 1, 1, 0], [1, 0, 0, 0], scope=f"fold-{k}").assign(key=lambda t, k=k: t.key + f"-{k}") for k in (0, 1)]
    test = arms([1, 1, 1, 1], [1, 1, 1, 1]).assign(label=metrics.UNLABELLED)
    predictions = pd.concat([test, *folds], ignore_index=True)
    part, rows = metrics.judged(predictions)
    assert part == "cv" and len(rows) == 16 and set(rows.scope) == {"fold-0", "fold-1"}
    found = metrics.summary(predictions)
    assert found["arms"]["mixed"]["test"] is None and found["arms"]["mixed"]["cv"]["accuracy"] == 0.75 and found["unlabelled"] == 4
    assert found["paired"]["from"] == "cv" and found["paired"]["difference"] == 0.5 and found["paired"]["images"] == 8
    half = f"{1.42942 * 50 * np.ptp(found['paired']['ci95']):.1f} points"
    assert f"out of fold, for the test part lacks labels; these folds would find {half} four times in five" in metrics.verdict(found)
    assert metrics.summary(predictions, unmixed=[("mixed", "fold-1")])["paired"] is None
    alone = metrics.summary(test)
    assert alone["paired"] is None and metrics.verdict(alone) == "No verdict: the test part has no labels and no folds were run"
    some = pd.concat([test, arms([1, 0], [1, 1]).assign(key=["a", "b"] * 2), *folds])
    assert metrics.judged(some)[0] == "cv", "two of six are not the test part that was planned"
    most = pd.concat([test, arms([1, 0] * 2, [1, 1] * 2).assign(key=list("abcd") * 2), *folds])
    assert metrics.judged(most)[0] == "test" and metrics.summary(most)["arms"]["mixed"]["test"]["images"] == 4


def test_unpaired_images_are_refused():
    with pytest.raises(ValueError, match="1 keys .*0003 first. have an answer of only one of mixed and real-matched"):
        metrics.paired_difference(arms([1, 1, 1, 1], [1, 1, 1, 0])[:-1])
    with pytest.raises(ValueError, match="no row of this arm"):
        metrics.paired_difference(answers([1, 0]))

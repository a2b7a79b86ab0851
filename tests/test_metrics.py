from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from vhs import metrics
from vhs.measure import CLASSES, VIEWS

few = hypothesis_settings(max_examples=25, deadline=None)


def answers(correct, arm="mixed", seed=0, patient=None, scope="split", label=None, source="here", index=np.nan) -> pd.DataFrame:
    """Predictions with the given correctness, image by image; a wrong answer is the next class."""
    n = len(correct)
    label = np.arange(n) % 3 if label is None else np.asarray(label)
    return pd.DataFrame({
        "key": [f"{i:016x}" for i in range(n)], "arm": arm, "scope": scope, "seed": seed, "patient": patient, "source": source,
        "label": label, "predicted": np.where(np.asarray(correct, dtype=bool), label, (label + 1) % 3), "index": index,
    })


def arms(first, second, **options) -> pd.DataFrame:
    return pd.concat([answers(first, "mixed", **options), answers(second, "real-matched", **options)], ignore_index=True)


def simulated(rng, n, images_per_patient=1, seeds=1, p=0.8) -> pd.DataFrame:
    """Two equally good arms: images share a difficulty, images of a patient more so."""
    owner = np.arange(n) // images_per_patient
    difficulty = np.sqrt(0.5) * rng.normal(size=n)[owner] + np.sqrt(0.5) * rng.normal(size=n)
    parts = []
    for arm in metrics.PRIMARY:
        for seed in range(seeds):
            correct = np.sqrt(0.7) * difficulty + np.sqrt(0.3) * rng.normal(size=n) < norm.ppf(p)
            parts.append(answers(correct, arm, seed, [f"p{i}" for i in owner]))
    return pd.concat(parts, ignore_index=True)


@few
@given(st.integers(1, 300), st.data())
def test_one_image_a_patient_is_wilsons_interval(n, data):
    right = data.draw(st.integers(0, n))
    found = metrics.accuracy(answers(np.arange(n) < right))
    want = binomtest(right, n).proportion_ci(method="wilson")
    assert found["accuracy"] == pytest.approx(right / n) and found["ci95"] == pytest.approx([want.low, want.high], abs=1e-9)
    assert found["images"] == found["patients"] == n


def test_the_study_by_hand():
    low, high = metrics.accuracy(answers(np.arange(400) < 321))["ci95"]
    assert (round(low, 4), round(high, 4)) == (0.7607, 0.8386)


@few
@given(st.lists(st.booleans(), min_size=4, max_size=60), st.integers(2, 4))
def test_copies_of_an_image_in_one_patient_add_no_certainty(correct, copies):
    one = answers(correct, patient=[f"p{i}" for i in range(len(correct))])
    many = answers(np.repeat(correct, copies), patient=[f"p{i}" for i in np.repeat(np.arange(len(correct)), copies)])
    a, b = metrics.accuracy(one), metrics.accuracy(many)
    assert b["accuracy"] == pytest.approx(a["accuracy"]) and b["patients"] == a["patients"]
    assert np.ptp(b["ci95"]) >= np.ptp(a["ci95"]) - 1e-9


@few
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_intervals_hold_their_estimate_and_swap_with_the_arms(seed, images_per_patient, seeds):
    predictions = simulated(np.random.default_rng(seed), 48, images_per_patient, seeds)
    one = metrics.accuracy(predictions[predictions.arm == "mixed"])
    paired, swapped = metrics.paired_difference(predictions), metrics.paired_difference(predictions, *metrics.PRIMARY[::-1])
    assert 0 <= one["ci95"][0] <= one["accuracy"] <= one["ci95"][1] <= 1
    assert -1 <= paired["ci95"][0] <= paired["difference"] <= paired["ci95"][1] <= 1
    assert swapped["difference"] == pytest.approx(-paired["difference"])
    assert swapped["ci95"] == pytest.approx([-bound for bound in paired["ci95"][::-1]])


def test_paired_difference_by_hand():
    # 40 images, 6 that only mixed gets right, 2 that only real-matched does: 42 observations and 41 degrees of freedom.
    found = metrics.paired_difference(arms([1] * 36 + [0] * 4, [1] * 30 + [0] * 6 + [1] * 2 + [0] * 2))
    assert found["difference"] == pytest.approx(4 / 40) and found["discordance"] == pytest.approx(8 / 40)
    assert found["arms"] == ["mixed", "real-matched"]
    centre, half = 4 / 42, 2.0195 * np.sqrt((10 / 42 - (4 / 42) ** 2) / 41)
    assert found["ci95"] == pytest.approx([centre - half, centre + half], abs=1e-4)


def test_equal_answers_still_leave_doubt():
    paired = metrics.paired_difference(arms([1] * 30, [1] * 30))
    assert paired["difference"] == 0 and paired["ci95"][0] < -0.02 and paired["ci95"][1] > 0.02


@pytest.mark.parametrize(("n", "images_per_patient", "seeds"), [(80, 1, 1), (80, 4, 1), (60, 1, 3)])
def test_null_pairs_and_true_accuracies_are_covered_about_95_times_in_100(n, images_per_patient, seeds):
    rng, draws = np.random.default_rng(5), 200
    hits = np.zeros(2)
    for _ in range(draws):
        predictions = simulated(rng, n, images_per_patient, seeds)
        low, high = metrics.paired_difference(predictions)["ci95"]
        least, most = metrics.accuracy(predictions[predictions.arm == "mixed"])["ci95"]
        hits += (low <= 0 <= high, least <= 0.8 <= most)
    assert (hits / draws >= 0.91).all() and (hits / draws <= 0.995).all()


def test_ignoring_the_patients_would_not_cover():
    rng, misses = np.random.default_rng(5), 0
    for _ in range(150):
        owner = np.repeat(np.arange(20), 6)
        correct = rng.random(20)[owner] < 0.5  # a patient's six images stand and fall together
        low, high = metrics.accuracy(answers(correct, patient=[f"p{i}" for i in owner]))["ci95"]
        naive = metrics.accuracy(answers(correct))["ci95"]
        assert np.ptp(naive) <= high - low + 1e-9
        misses += not low <= 0.5 <= high
    assert misses <= 15


def test_seeds_average_before_images_do():
    predictions = pd.concat([answers([1, 1, 0, 0], seed=0), answers([1, 0, 1, 0], seed=1)])
    assert metrics.accuracy(predictions)["accuracy"] == 0.5 and metrics.accuracy(predictions)["images"] == 4


@few
@given(st.integers(1, 1000), st.floats(0.01, 1))
def test_minimum_detectable_shrinks_with_the_root_of_n(n, discordance):
    assert metrics.minimum_detectable(4 * n, discordance) == pytest.approx(metrics.minimum_detectable(n, discordance) / 2)
    assert metrics.minimum_detectable(n, discordance / 2) < metrics.minimum_detectable(n, discordance)


def test_minimum_detectable_agrees_with_the_interval():
    assert round(metrics.minimum_detectable(80, 0.25), 2) == 0.11 and round(metrics.minimum_detectable(401, 0.25), 3) == 0.049
    paired = metrics.paired_difference(simulated(np.random.default_rng(0), 400))
    assert np.ptp(paired["ci95"]) / 2 == pytest.approx(metrics.minimum_detectable(400, paired["discordance"]), rel=0.05)


@pytest.mark.parametrize(("paired", "sentence"), [
    ({"difference": 0.063, "ci95": [0.012, 0.11]}, "Generation helped: +6.3 points [1.2, 11.0]"),
    ({"difference": 0.010, "ci95": [-0.042, 0.063]},
     "No difference could be shown: +1.0 points [-4.2, 6.3]; this test set could have detected about 5.2 points"),
    ({"difference": -0.08, "ci95": [-0.12, -0.031]}, "Generation hurt: -8.0 points [-12.0, -3.1]"),
    (None, "No verdict: mixed and real-matched were not both trained as planned"),
])
def test_verdict(paired, sentence):
    assert metrics.verdict(paired) == sentence


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


def test_generated_and_labeller_figures():
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
    measured = pd.DataFrame({"label": [0, 1, 2], "index": [8.0, np.nan, 10.5], "measured": [8.1, 9.0, 9.9]})
    quality = metrics.labeller_quality(measured, VIEWS["canine_lateral"])
    assert quality == {"index_mae": pytest.approx(0.35), "class_accuracy": pytest.approx(2 / 3)}
    assert metrics.labeller_quality(measured.assign(index=np.nan), VIEWS["canine_lateral"])["index_mae"] is None


def test_summary_has_the_documented_shape():
    predictions = pd.concat([
        answers([1, 1, 0, 1], "real"), arms([1, 1, 1, 1], [1, 1, 0, 0]), arms([1, 1, 1, 1], [1, 1, 0, 0], seed=1),
        answers([1, 1, 0, 1], "measure", seed=metrics.NO_SEED),
        answers([1, 0], "real", scope="fold-0"), answers([1, 1], "real", scope="fold-1").assign(key=["a", "b"]),
    ])
    found = metrics.summary(predictions, labeller=None, generated={"asked": 4, "produced": 3, "accepted": 2, "agreement": 0.5})
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"arms", "paired", "labeller", "generated"} and list(found["arms"]) == ["real", "real-matched", "mixed", "measure"]
    assert set(found["arms"]["real"]) == {"test", "cv", "seeds"} and set(found["arms"]["real"]["test"]) == {"accuracy", "ci95"}
    cv = found["arms"]["real"]["cv"]
    assert cv["accuracy"] == 0.75 and cv["folds"] == 2 and set(cv) == {"accuracy", "ci95", "folds"} and found["arms"]["mixed"]["cv"] is None
    assert found["arms"]["mixed"]["seeds"] == [0, 1] and found["arms"]["measure"]["seeds"] == []
    assert set(found["paired"]) == {"arms", "difference", "ci95"} and found["paired"]["difference"] == 0.5
    assert metrics.summary(predictions[predictions.arm != "mixed"], labeller=None, generated=None)["paired"] is None


def test_summary_refuses_an_arm_without_test_predictions():
    with pytest.raises(ValueError, match="arm real has no predictions of scope 'split', only of fold-0"):
        metrics.summary(answers([1, 0], "real", scope="fold-0"), labeller=None, generated=None)


def test_unpaired_images_are_refused():
    with pytest.raises(ValueError, match="1 keys .*0003 first. have an answer of only one of mixed and real-matched"):
        metrics.paired_difference(arms([1, 1, 1, 1], [1, 1, 1, 0])[:-1])
    with pytest.raises(ValueError, match="no row of this arm"):
        metrics.paired_difference(answers([1, 0]))

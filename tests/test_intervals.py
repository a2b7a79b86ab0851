"""Intervals: by hand, by their laws, and by how often they cover where the truth is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from sklearn.metrics import balanced_accuracy_score
from test_metrics import answers, arms, simulated

from vhs import metrics
from vhs.arms import PRIMARY

few = hypothesis_settings(max_examples=25, deadline=None)


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
    paired, swapped = metrics.paired_difference(predictions), metrics.paired_difference(predictions, *PRIMARY[::-1])
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


def retrained(rng, n, seeds, spread, scopes=1) -> pd.DataFrame:
    """Two equally good arms, of which every training is a little better or worse than another on all images."""
    parts, difficulty = [], rng.normal(0.9, 1.5, n)
    for arm in PRIMARY:
        for seed in range(seeds):
            for scope, images in enumerate(np.array_split(np.arange(n), scopes)):
                correct = difficulty[images] + rng.normal(0, spread) + rng.normal(0, 0.35, len(images)) > 0
                parts.append(answers(correct, arm, seed, scope=f"fold-{scope}").assign(key=[f"{i:04}" for i in images]))
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize(("seeds", "scopes", "covered"), [(2, 1, 0.85), (2, 5, 0.93), (3, 1, 0.9), (5, 1, 0.92)])
def test_another_training_is_as_much_of_a_sample_as_another_patient(seeds, scopes, covered):
    rng, draws, spread = np.random.default_rng(seeds), 150, 0.15
    right, hits = norm.cdf(0.9 / np.sqrt(1.5**2 + spread**2 + 0.35**2)), np.zeros(3)
    for _ in range(draws):
        predictions = retrained(rng, 400, seeds, spread, scopes)
        least, most = metrics.accuracy(predictions[predictions.arm == "mixed"])["ci95"]
        both = [metrics.paired_difference(rows)["ci95"] for rows in (predictions, predictions[predictions.seed == 0])]
        hits += (least <= right <= most, *(low <= 0 <= high for low, high in both))
    assert (hits[:2] / draws >= covered).all() and hits[2] / draws < 0.8, "one training alone says too much"


def test_one_patient_says_nothing_of_others():
    correct = np.arange(100) < 80
    predictions = arms(correct, np.roll(correct, 10) & correct).assign(patient="p")
    assert metrics.paired_difference(predictions)["ci95"] == [-1, 1]
    low, high = metrics.accuracy(predictions[predictions.arm == "mixed"])["ci95"]
    assert low < 0.05 and high > 0.95


@pytest.mark.parametrize("sizes", [[40] * 2, [40] * 3, [2] * 19 + [38], [2] * 39 + [78], [5] * 40])
def test_equal_arms_are_not_told_apart_whatever_patients_have_of_the_images(sizes):
    rng, owner, draws, misses = np.random.default_rng(6), np.repeat(np.arange(len(sizes)), sizes), 100, 0
    for _ in range(draws):
        difficulty = rng.normal(0, 1, len(owner))
        right = [difficulty + rng.normal(0, 0.7, len(sizes))[owner] + rng.normal(0, 0.6, len(owner)) > -0.9 for _ in (0, 1)]
        low, high = metrics.paired_difference(arms(*right).assign(patient=lambda rows: [f"p{owner[int(key, 16)]}" for key in rows.key]))["ci95"]
        misses += not low <= 0 <= high
    assert misses / draws <= 0.09


def test_a_small_class_that_is_all_right_is_no_certainty():
    """Three classes, one of them of 2 to 4 images: a few equal answers."""
    rng, draws = np.random.default_rng(7), 150
    for smallest in (2, 3, 4):
        label, hits = np.repeat([0, 1, 2], [smallest, 45, 51]), 0
        for _ in range(draws):
            right = rng.random(len(label)) < 0.75
            found = metrics.balanced_accuracy(answers(right).assign(label=label, predicted=np.where(right, label, (label + 1) % 3)))["balanced_ci95"]
            hits += found[0] <= 0.75 <= found[1]
        assert hits / draws >= 0.88, (smallest, hits / draws)


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


@few
@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=3, max_size=60))
def test_balanced_accuracy_is_sklearns_and_inside_its_interval(images):
    label, correct = np.array([label for label, _ in images]), [right for _, right in images]
    rows = answers(correct, label=label)
    found = metrics.balanced_accuracy(rows)
    of_class = [np.mean([right for (name, right) in images if name == label]) for label in sorted(set(label))]
    assert found["balanced_accuracy"] == pytest.approx(np.mean(of_class))
    low, high = found["balanced_ci95"]
    assert 0 <= low <= found["balanced_accuracy"] <= high <= 1
    if set(rows.predicted) <= set(label):  # scikit-learn warns of a predicted class that no image has
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(rows.label, rows.predicted))


def test_balanced_accuracy_of_balanced_classes_is_an_accuracy():
    rows = answers(np.tile([1, 1, 1, 0], 30).repeat(3), label=np.tile(np.arange(3), 120))
    plain, balanced = metrics.accuracy(rows), metrics.balanced_accuracy(rows)
    assert balanced["balanced_accuracy"] == plain["accuracy"] and balanced["balanced_ci95"] == pytest.approx(plain["ci95"], abs=2e-4)


def test_true_balanced_accuracies_are_covered_about_95_times_in_100():
    rng, draws, hits = np.random.default_rng(2), 300, 0
    label, recall = np.repeat([0, 1, 2], [15, 45, 60]), np.array([0.5, 0.7, 0.9])
    for _ in range(draws):
        low, high = metrics.balanced_accuracy(answers(rng.random(120) < recall[label], label=label))["balanced_ci95"]
        hits += low <= recall.mean() <= high
    assert 0.91 <= hits / draws <= 0.99


def test_seeds_average_before_images_do():
    predictions = pd.concat([answers([1, 1, 0, 0], seed=0), answers([1, 0, 1, 0], seed=1)])
    assert metrics.accuracy(predictions)["accuracy"] == 0.5 and metrics.accuracy(predictions)["images"] == 4


@few
@given(st.integers(1, 1000), st.floats(0.01, 1))
def test_minimum_detectable_shrinks_with_the_root_of_n(n, discordance):
    assert metrics.minimum_detectable(4 * n, discordance) == pytest.approx(metrics.minimum_detectable(n, discordance) / 2)
    assert metrics.minimum_detectable(n, discordance / 2) < metrics.minimum_detectable(n, discordance)


def test_minimum_detectable_agrees_with_the_interval():
    """1.43 half-widths: by the normal distribution that is 80% power."""
    assert round(metrics.minimum_detectable(401, 0.25), 2) == 0.07 and norm.cdf(1.4294 * 1.96 - 1.96) == pytest.approx(0.8, abs=1e-3)
    paired = metrics.paired_difference(simulated(np.random.default_rng(0), 400))
    assert metrics.detectable(paired["ci95"]) == pytest.approx(1.4294 * np.ptp(paired["ci95"]) / 2, rel=1e-4)
    assert metrics.detectable(paired["ci95"]) == pytest.approx(metrics.minimum_detectable(400, paired["discordance"]), rel=0.05)

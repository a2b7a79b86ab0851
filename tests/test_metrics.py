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
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

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
    rng, owner, draws, misses = np.random.default_rng(6), np.repeat(np.arange(len(sizes)), sizes), 200, 0
    for _ in range(draws):
        difficulty = rng.normal(0, 1, len(owner))
        right = [difficulty + rng.normal(0, 0.7, len(sizes))[owner] + rng.normal(0, 0.6, len(owner)) > -0.9 for _ in (0, 1)]
        low, high = metrics.paired_difference(arms(*right).assign(patient=lambda rows: [f"p{owner[int(key, 16)]}" for key in rows.key]))["ci95"]
        misses += not low <= 0 <= high
    assert misses / draws <= 0.08


def test_a_small_class_that_is_all_right_is_no_certainty():
    """Three classes, one of them of 2 to 4 images: a few equal answers."""
    rng, draws = np.random.default_rng(7), 300
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
    assert 1.4294 * np.ptp(paired["ci95"]) / 2 == pytest.approx(metrics.minimum_detectable(400, paired["discordance"]), rel=0.05)


def found(paired: dict | None, purpose: str = "confirmatory", judged: bool = True) -> dict:
    """A summary as far as the verdict reads it."""
    arm = {"test": {"accuracy": 0.5} if judged else None, "validation": None, "cv": None, "seeds": [0]}
    return {"paired": paired, "purpose": purpose, "arms": {"mixed": arm}}


@pytest.mark.parametrize(("paired", "sentence"), [
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 3}, "Generation helped: +6.3 points [1.2, 11.0]"),
    ({"from": "test", "difference": 0.010, "ci95": [-0.042, 0.063], "seeds": 3},
     "No difference could be shown: +1.0 points [-4.2, 6.3]; this test set would find 7.5 points four times in five"),
    ({"from": "test", "difference": 0.010, "ci95": [-0.042, 0.063], "seeds": 2, "from_trainings": 0.9},
     "No difference could be shown: +1.0 points [-4.2, 6.3]; this test set would find 7.5 points four times in five; most of that is how trainings differ: "
     "more seeds would tell, not more images"),
    ({"from": "test", "difference": -0.08, "ci95": [-0.12, -0.031], "seeds": 3}, "Generation hurt: -8.0 points [-12.0, -3.1]"),
    ({"from": "cv", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 3},
     "Generation helped: +6.3 points [1.2, 11.0] out of fold, for the test part lacks labels"),
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11], "seeds": 1},
     "Descriptive: generation helped: +6.3 points [1.2, 11.0]; each arm was trained once, and what another training would say is not in it"),
    ({"from": "test", "difference": 0.063, "ci95": [0.012, 0.11]}, "Generation helped: +6.3 points [1.2, 11.0]"),  # of a former version's run
    (None, "No verdict: mixed and real-matched were not both trained as planned"),
])
def test_verdict(paired, sentence):
    assert metrics.verdict(found(paired)) == sentence
    said = sentence.removeprefix("Descriptive: ")
    assert metrics.verdict(found(paired, "descriptive")) == f"Descriptive: {said[0].lower()}{said[1:]}"


def test_no_labels_and_no_folds_leave_no_verdict():
    assert metrics.verdict(found(None, judged=False)) == "No verdict: the test part has no labels and no folds were run"


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
    assert set(found) == {"purpose", "patients_known", "unlabelled", "arms", "paired", "differences", "labeller", "generated", "generators", "likeness"}
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

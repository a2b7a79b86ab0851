"""The predictions table: one row is one classifier's word on one image.

Columns: key, arm, scope, seed, role, patient, source, label, predicted (positions in CLASSES), p_small, p_normal, p_large, index (the true
VHS or CTR, NaN where unknown). A missing patient means that the image is its own. An arm that trains nothing (measure, source) has one row an image
and the seed NO_SEED; for measure probabilities are only zeros and ones.

`role` says what the scope did with the image: HELD_OUT, which is judged on, or VALIDATION, which served schedulers and thresholds and is
shown beside. An image of a test part that came without labels has the label UNLABELLED: it is predicted, and judges nobody.
"""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd

from vhs.arms import ARMS

NO_SEED = -1
UNLABELLED = -1
HELD_OUT, VALIDATION = "held-out", "validation"


def joined_once(predictions: pd.DataFrame, expected_keys: Collection[str]) -> pd.DataFrame:
    """The same rows ordered by arm, seed and key, after checking that every arm and seed answers each expected key exactly once.

    Raises ValueError naming the keys that are repeated, missing or not expected: an evaluation over a part of the images is no evaluation.
    """
    expected = set(expected_keys)
    for (arm, seed), keys in predictions.groupby(["arm", "seed"]).key:
        repeated, answered = set(keys[keys.duplicated()]), set(keys)
        found = {"more than once": repeated, "not at all": expected - answered, "without being asked": answered - expected}
        if wrong := [f"{len(some)} {how} ({', '.join(sorted(some)[:3])}{', …' * (len(some) > 3)})" for how, some in found.items() if some]:
            what = f"arm {arm}, seed {seed} answers {'; '.join(wrong)} of {len(expected)} keys"
            raise ValueError(f"{what}: remove its predictions and evaluate it again")
    return predictions.sort_values(["arm", "seed", "key"], ignore_index=True)


def of_test_part(predictions: pd.DataFrame) -> pd.DataFrame:
    """The labelled rows of the test part."""
    return predictions[(predictions.scope == "split") & (predictions.role == HELD_OUT) & (predictions.label != UNLABELLED)]


def out_of_fold(predictions: pd.DataFrame) -> pd.DataFrame:
    """The pooled out-of-fold rows: each image judged by the fold that held it out."""
    return predictions[(predictions.scope != "split") & (predictions.role == HELD_OUT)]


def judged(predictions: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """What the verdict rests on: ("test", the test part's labelled rows), or ("cv", the out-of-fold rows) where the test part has no labels, or of less than
    half of its images and folds were run: that is not the test part that was planned."""
    tested, folds = of_test_part(predictions), out_of_fold(predictions)
    whole = predictions[(predictions.scope == "split") & (predictions.role == HELD_OUT)]
    return ("cv", folds) if 2 * tested.key.nunique() < whole.key.nunique() and len(folds) or not len(tested) else ("test", tested)


def by_arm(predictions: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(arm, its rows) in the order of ARMS, others after them by name."""
    order = list(ARMS)
    return sorted(predictions.groupby("arm"), key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), pair[0]))


def owners(predictions: pd.DataFrame) -> pd.Series:
    """The patient of each row, or the image itself where none is named."""
    return predictions.patient.astype(object).where(predictions.patient.notna(), predictions.key)

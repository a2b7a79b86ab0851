"""How well the labeller measures: agreement with the true index."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vhs import metrics

few = hypothesis_settings(max_examples=30, deadline=None)
numbers = st.lists(st.tuples(st.floats(4, 16), st.floats(4, 16)), min_size=2, max_size=30)


def test_bland_altman_by_hand():
    found = metrics.bland_altman([8.1, 9.0, 9.9], [8.0, 9.2, 9.5])  # differences 0.1, -0.2, 0.4: mean 0.1, standard deviation 0.3
    assert found == {"images": 3, "mae": pytest.approx(0.7 / 3), "bias": pytest.approx(0.1), "limits": pytest.approx([0.1 - 0.588, 0.1 + 0.588])}
    assert metrics.bland_altman([8.1, np.nan], [8.0, 9.0])["limits"] is None
    assert metrics.bland_altman([8.1], [np.nan]) is None


@few
@given(numbers)
def test_swapping_the_measurements_turns_the_bias_round(pairs):
    a, b = np.array(pairs).T
    one, other = metrics.bland_altman(a, b), metrics.bland_altman(b, a)
    assert other["bias"] == pytest.approx(-one["bias"]) and other["mae"] == pytest.approx(one["mae"])
    assert other["limits"] == pytest.approx([-limit for limit in one["limits"][::-1]])
    assert one["limits"][0] <= one["bias"] <= one["limits"][1] and abs(one["bias"]) <= one["mae"] + 1e-9


@few
@given(numbers, st.floats(-2, 2))
def test_an_offset_moves_bias_and_limits_and_nothing_else(pairs, offset):
    a, b = np.array(pairs).T
    one, moved = metrics.bland_altman(a, b), metrics.bland_altman(a + offset, b)
    assert moved["bias"] == pytest.approx(one["bias"] + offset, abs=1e-9)
    assert np.ptp(moved["limits"]) == pytest.approx(np.ptp(one["limits"]), abs=1e-9)


def test_about_95_in_100_lie_within_the_limits():
    rng = np.random.default_rng(0)
    true = rng.normal(9, 1, 5000)
    low, high = metrics.bland_altman(true + rng.normal(0.2, 0.3, 5000), true)["limits"]
    assert 0.94 < ((lambda d: (low < d) & (d < high))(rng.normal(0.2, 0.3, 5000))).mean() < 0.96


def test_labeller_quality_by_hand():
    measured = pd.DataFrame({
        "label": [0, 1, 2, 2, 1], "predicted": [0, 1, 1, 2, 0], "index": [8.0, np.nan, 10.5, 10.4, 9.0], "measured": [8.1, 9.0, 9.9, 10.2, np.nan],
        "spread": [0.1, 0.9, 0.3, 0.2, 5.0], "source": ["a", "a", "b", "b", "c"],  # of the last one two points coincide: a wrong answer, no error
    })  # fmt: skip
    quality = metrics.labeller_quality(measured)
    assert quality["class_accuracy"] == 0.6 and quality["index_mae"] == pytest.approx(0.3) and quality["bias"] == pytest.approx(-0.7 / 3)
    assert quality["spread_rank"] == pytest.approx(1)  # errors 0.1, 0.6, 0.2 rise with spreads 0.1, 0.3, 0.2
    blind = metrics.labeller_quality(measured.assign(index=np.nan))
    assert blind == {"class_accuracy": 0.6, "index_mae": None, "bias": None, "limits": None, "spread_rank": None}
    by_source = metrics.measurement_by(measured, "source")
    assert by_source[["source", "images"]].to_numpy().tolist() == [["a", 1], ["b", 2]] and by_source.mae.tolist() == pytest.approx([0.1, 0.4])

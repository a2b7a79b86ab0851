"""The geometry behind every label: what must not change an index, and what must."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.io import loadmat

from vhs.measure import CLASSES, VIEWS

DATA = Path(os.environ.get("VHS_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
DOG, HUMAN = VIEWS["canine_lateral"], VIEWS["human_frontal"]


def spread_out(view):
    """Points whose axes have some length, in a frame of 1000 px."""
    points = arrays(np.float64, (len(view.points), 2), elements=st.floats(0, 1000))
    return points.filter(lambda p: all(np.abs(p[i] - p[j]).min() > 20 for i, j in view.axes))


@given(spread_out(DOG), st.floats(0.1, 10), st.floats(0, 2 * np.pi), arrays(np.float64, 2, elements=st.floats(-500, 500)), st.booleans())
def test_vhs_survives_every_similarity(points, scale, angle, shift, flip):
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = scale * points @ turn.T + shift
    if flip:
        moved = (moved * [-1, 1])[list(DOG.mirror)]
    assert DOG.measure(moved) == pytest.approx(DOG.measure(points), rel=1e-9)


@given(spread_out(HUMAN), st.floats(0.1, 10), arrays(np.float64, 2, elements=st.floats(-500, 500)), st.booleans())
def test_ctr_survives_scale_shift_and_mirror(points, scale, shift, flip):
    moved = scale * points + shift
    if flip:
        moved = (moved * [-1, 1])[list(HUMAN.mirror)]
    assert HUMAN.measure(moved) == pytest.approx(HUMAN.measure(points), rel=1e-9)


@given(st.floats(1.05, 3), st.floats(50, 200), st.floats(50, 200), st.floats(60, 300))
def test_a_squash_changes_vhs(squash, long_axis, short_axis, span):
    # the heart upright, the spine level: a horizontal squash shortens the ruler more than the heart
    points = np.array([[100, 0], [100, long_axis], [50, 40], [50 + short_axis, 40], [0, 300], [span, 300]], np.float64)
    share = long_axis / (long_axis + short_axis)
    assert DOG.measure(points / [squash, 1]) == pytest.approx(DOG.measure(points) * (share * squash + 1 - share))


def test_a_published_mistake_has_its_published_size():
    """Measured after a square resize of a 1200 x 800 image, a level spine and a steep heart: one normal heart became large."""
    points = np.array([[0, 0], [30, 300], [0, 100], [200, 80], [0, 400], [302, 400]], np.float64)
    honest, squashed = DOG.measure(points), DOG.measure(points * [512 / 1200, 512 / 800])
    assert DOG.classify(honest) == CLASSES.index("normal") and DOG.classify(squashed) == CLASSES.index("large")


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_mirror_is_its_own_inverse(view):
    order = np.array(view.mirror)
    assert sorted(order) == list(range(len(view.points))) and (order[order] == np.arange(len(order))).all()


@given(spread_out(DOG))
def test_torch_and_numpy_agree_and_torch_has_gradients(points):
    leaf = torch.from_numpy(points.copy()).requires_grad_()
    index = DOG.measure(leaf)
    index.backward()
    assert index.item() == pytest.approx(DOG.measure(points)) and torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0


@given(arrays(np.float64, (4, 5), elements=st.floats(0, 30)))
def test_classes_rise_with_the_index_and_keep_its_shape(index):
    classes = DOG.classify(index)
    assert classes.shape == index.shape and classes.dtype == np.int64
    assert (np.diff(classes.ravel()[np.argsort(index.ravel())]) >= 0).all()


def test_edges_belong_to_normal_unless_said_otherwise():
    assert DOG.classify([8.199, 8.2, 10.0, 10.001]).tolist() == [0, 1, 1, 2]
    assert HUMAN.classify([0.419, 0.42, 0.5, 0.501]).tolist() == [0, 1, 1, 2]
    assert DOG.with_edges(None, high_is_large=True).classify([8.2, 10.0]).tolist() == [1, 2]
    assert DOG.with_edges((7, 9)).classify([8.0, 9.5]).tolist() == [1, 2]
    assert CLASSES == ("small", "normal", "large")


def test_illegal_input_is_named():
    with pytest.raises(ValueError, match="6 points .A, B"):
        DOG.measure(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="1 of 2 images"):
        DOG.classify([9.0, np.nan])
    with pytest.raises(ValueError, match="10 and 8"):
        DOG.with_edges((10, 8))


@pytest.mark.parametrize("view", VIEWS.values(), ids=list(VIEWS))
def test_plausible_ranges_hold_every_class(view):
    low, high = view.plausible
    assert view.classify([low, high]).tolist() == [0, 2]


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no label files at {DATA}: set VHS_TEST_DATA")
def test_the_dogheart_label_gives_its_own_vhs():
    label = loadmat(DATA / "formats" / "Dog_Heart_VHS" / "Train" / "Labels" / "1_12.3_1.mat")
    assert DOG.measure(label["six_points"].astype(np.float64)) == pytest.approx(12.315, abs=5e-4)
    assert DOG.measure(label["six_points"].astype(np.float64)) == pytest.approx(label["VHS"].item(), abs=5e-3)

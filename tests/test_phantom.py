"""Phantoms: the index that was asked for is the one measured, the points lie on the anatomy, one seed is one patient."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhs.measure import VIEWS
from vhs.phantom import RANGES, STYLES, draw, draw_many
from vhs.phantom_film import Canvas, Film, develop

KINDS = [(view, style) for view in VIEWS for style in STYLES]
seeds = st.integers(0, 2**40)


def _sample(image, point):
    x, y = np.clip(np.round(point).astype(int), 0, image.shape[0] - 1)
    return float(image[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].mean())


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(KINDS), seeds, st.floats(0, 1))
def test_index_is_exact_and_points_keep_their_margin(kind, seed, share):
    view, style = kind
    least, most = RANGES[view]
    index = least + share * (most - least)
    phantom = draw(view, style, seed, size_px=48, index=index)
    assert phantom.image.shape == (48, 48) and phantom.image.dtype == np.uint8 and phantom.points.dtype == np.float32
    assert phantom.index == float(VIEWS[view].measure(phantom.points.astype(np.float64)))
    assert phantom.index == pytest.approx(index, rel=2e-6)
    place = (phantom.points + 0.5) / 48
    assert place.min() >= 0.03 and place.max() <= 0.97


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(KINDS), seeds)
def test_same_anatomy_at_any_size(kind, seed):
    small, large = (draw(*kind, seed, size_px=size) for size in (64, 192))
    np.testing.assert_allclose((small.points + 0.5) / 64, (large.points + 0.5) / 192, atol=1e-5)
    shrunk = cv2.resize(large.image, (64, 64), interpolation=cv2.INTER_AREA)
    coarse = [cv2.GaussianBlur(image.astype(np.float32), (0, 0), 2).ravel() for image in (small.image, shrunk)]
    assert np.corrcoef(coarse)[0, 1] > 0.98


@pytest.mark.parametrize("view, style", KINDS)
def test_pure_function_of_its_arguments(view, style):
    np.random.seed(1)
    before, threads = np.random.get_state()[1].copy(), cv2.getNumThreads()
    first, again, other = draw(view, style, 5), draw(view, style, 5), draw(view, style, 6)
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.points, again.points)
    assert (first.image != other.image).mean() > 0.3 and first.index != other.index
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    assert cv2.getNumThreads() == threads


@pytest.mark.parametrize("view, style", KINDS)
def test_mirrored_points_measure_the_same(view, style):
    phantom = draw(view, style, 11)
    mirrored = phantom.points[list(VIEWS[view].mirror)].copy()
    mirrored[:, 0] = 127 - mirrored[:, 0]
    assert VIEWS[view].measure(mirrored) == pytest.approx(phantom.index, rel=1e-5)
    if view == "human_frontal":  # the names stay on their sides of the image
        assert mirrored[0, 0] < mirrored[1, 0] and mirrored[2, 0] < mirrored[3, 0]


@pytest.mark.parametrize("style", STYLES)
def test_canine_points_follow_the_anatomy(style):
    for seed in range(40):
        a, b, c, d, e, f = draw("canine_lateral", style, seed, size_px=64).points.astype(np.float64)
        assert a[1] < b[1] and c[0] < d[0] and e[0] < f[0] and max(e[1], f[1]) < a[1]  # head left, spine above the heart
        assert abs((b - a) @ (d - c)) < 1e-3 * np.linalg.norm(b - a) * np.linalg.norm(d - c)  # short axis at a right angle
        assert np.linalg.norm(d - c) < np.linalg.norm(b - a)


@pytest.mark.parametrize("view, style", KINDS)
def test_heart_is_denser_than_the_lung_beside_it(view, style):
    left, right = (2, 3) if view == "canine_lateral" else (0, 1)
    steps = []
    for seed in range(60):
        phantom = draw(view, style, seed)
        across = phantom.points[right] - phantom.points[left]
        across *= 5 / np.linalg.norm(across)
        borders = ((phantom.points[left], across), (phantom.points[right], -across))
        steps.append([_sample(phantom.image, p + inward) - _sample(phantom.image, p - inward) for p, inward in borders])
    steps = np.array(steps)
    assert (steps.mean(0) > 8).all(), "borders can be seen on average"
    assert (steps > 0).mean() > 0.75


@pytest.mark.parametrize("style", STYLES)
def test_thorax_stays_when_the_heart_grows(style):
    small, large = (draw("human_frontal", style, 3, index=index).points for index in (0.36, 0.6))
    np.testing.assert_array_equal(small[2:], large[2:])
    assert large[1, 0] - large[0, 0] > 1.5 * (small[1, 0] - small[0, 0])


@pytest.mark.parametrize("view", VIEWS)
def test_prior_draws_the_class(view):
    for wanted in range(3):
        prior = np.eye(3)[wanted]
        _, points = draw_many(view, "clinic", range(25), 32, prior=tuple(prior))
        assert (VIEWS[view].classify(VIEWS[view].measure(points)) == wanted).all()
    _, points = draw_many(view, "textbook", range(150), 32, prior=(0.2, 0.2, 0.6))
    shares = np.bincount(VIEWS[view].classify(VIEWS[view].measure(points)), minlength=3) / 150
    np.testing.assert_allclose(shares, (0.2, 0.2, 0.6), atol=0.12)


@pytest.mark.parametrize("size", [48, 128])
def test_solid_knows_its_border_outside_the_frame(size):
    square = [[-0.1, -2], [1.1, -2], [1.1, 3], [-0.1, 3]]
    thickness = Canvas(size).solid(np.array(square), rounding=0.4)
    depth = np.minimum(0.1 + np.minimum(Canvas(size).x[0], 1 - Canvas(size).x[0]), 0.4) / 0.4
    np.testing.assert_allclose(thickness, np.broadcast_to(np.sqrt(1 - (1 - depth) ** 2), (size, size)), atol=0.03)


def test_grain_is_independent_of_pixel_size():
    """Photons are caught by area, so a shrunk film is as noisy as one drawn small: every image passes through the same resize."""
    film = Film(kilovoltage=1, scatter=0, photons=4000, focus=0.001, window=(1, 99), lift=0.2, gamma=1, contrast=0)
    grain = []
    for size in (64, 256):
        canvas = Canvas(size)
        wedge = np.broadcast_to(np.where(canvas.x < 0.5, 0.4, 2.0), (size, size)).astype(np.float32)
        grey = develop(canvas, wedge, np.ones_like(wedge), film, np.random.default_rng(0))
        grain.append(cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA)[:, 40:60].std())
    assert 0.8 < grain[0] / grain[1] < 1.25


def test_workers_keep_order_and_bytes():
    order = [7, 2, 9, 2]
    alone, together = (draw_many("canine_lateral", "clinic", order, 48, workers=workers) for workers in (1, 2))
    for one, two in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(alone[0][1], alone[0][3])
    np.testing.assert_array_equal(alone[0][2], draw("canine_lateral", "clinic", 9, size_px=48).image)
    images, points = draw_many("human_frontal", "clinic", [], 48)
    assert images.shape == (0, 48, 48) and points.shape == (0, 4, 2)


@pytest.mark.parametrize("view", VIEWS)
def test_styles_are_different_populations(view):
    """The points alone tell the styles apart: the clinic is no re-exposed textbook."""
    places = [draw_many(view, style, range(60), 32)[1].reshape(60, -1) for style in STYLES]
    gap = abs(places[0].mean(0) - places[1].mean(0)) / np.sqrt((places[0].var(0) + places[1].var(0)) / 2)
    assert gap.max() > 0.8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(view="feline", style="clinic", seed=0), "feline"),
        (dict(view="canine_lateral", style="x", seed=0), "textbook, clinic"),
        (dict(view="canine_lateral", style="clinic", seed=-1), "seed -1"),
        (dict(view="canine_lateral", style="clinic", seed=0, size_px=8), "size_px 8"),
        (dict(view="canine_lateral", style="clinic", seed=0, index=0.5), "6.5 and 12.5"),
        (dict(view="human_frontal", style="clinic", seed=0, prior=(1, 1, 1)), "add to 1"),
    ],
)
def test_illegal_arguments_are_named(arguments, message):
    view, style, seed = (arguments.pop(name) for name in ("view", "style", "seed"))
    with pytest.raises(ValueError, match=message):
        draw(view, style, seed, **arguments)

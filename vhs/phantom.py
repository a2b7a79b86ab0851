"""Drawn radiographs with exact key points: they school the base model and stand in for a data folder in the demo and in CI.

Each image is a pure function of its arguments. Anatomy, film and photon noise have random streams of their own, so one seed is one patient:
the same at every size, and with another `index` the same patient with another heart.
Two styles: "textbook" varies exposure, noise, collimation and markers widely; "clinic" is another population on another machine, a visibly
different domain under the same measuring rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import cv2
import numpy as np

from vhs import phantom_canine, phantom_human
from vhs.measure import CLASSES, VIEWS
from vhs.phantom_film import Canvas, develop, random_film, surround

STYLES = ("textbook", "clinic")
RANGES = {"canine_lateral": (6.5, 12.5), "human_frontal": (0.33, 0.65)}  # of the index, in its view's unit
ANATOMY = {"canine_lateral": phantom_canine.attenuation, "human_frontal": phantom_human.attenuation}
EVEN = (1 / 3, 1 / 3, 1 / 3)


@dataclass(frozen=True)
class Phantom:
    """One drawn radiograph: image uint8 [S, S], points float32 [K, 2] (pixels, centres at integers), index measured on the points."""

    image: np.ndarray
    points: np.ndarray
    index: float


def _draw_index(view: str, rng, prior) -> float:
    """A class from `prior`, then an index in its range; the outer classes thin out away from their edge, as in a clinic's patients."""
    if len(prior) != len(CLASSES) or min(prior) < 0 or not np.isclose(sum(prior), 1, atol=1e-6):
        raise ValueError(f"prior must hold {len(CLASSES)} shares of {CLASSES} that add to 1, got {tuple(prior)}")
    low, high = VIEWS[view].edges
    least, most = RANGES[view]
    wanted = int(rng.choice(len(CLASSES), p=np.asarray(prior, float) / sum(prior)))
    begin, end = ((low, least), (low, high), (high, most))[wanted]
    share = rng.uniform() if wanted == 1 else rng.beta(1, 1.3)
    return float(begin + (end - begin) * np.clip(share, 1e-3, 1 - 1e-3))  # off the edges, where rounding to float32 could change the class


def _stream(view: str, style: str, seed: int, k: int) -> np.random.Generator:
    return np.random.default_rng([seed, list(VIEWS).index(view), STYLES.index(style), k])


def drawn_index(view: str, style: str, seed: int, prior: Sequence[float] = EVEN) -> float:
    """The index that `draw` draws where it is given none, without the image."""
    return _draw_index(view, _stream(view, style, seed, 0), prior)


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV without threads: results and speed do not depend on the machine's cores."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)


def draw(view: str, style: str, seed: int, *, size_px: int = 128, index: float | None = None, prior: Sequence[float] = EVEN) -> Phantom:
    """Draw one phantom. `index` fixes VHS or CTR, else a class is drawn from `prior` and an index in it. Illegal argument: ValueError."""
    if view not in ANATOMY or style not in STYLES:
        raise ValueError(f"no phantom for view {view!r} in style {style!r}: views are {', '.join(ANATOMY)}, styles {', '.join(STYLES)}")
    if seed < 0 or size_px < 32:
        raise ValueError(f"a phantom needs seed >= 0 and size_px >= 32, got seed {seed} and size_px {size_px}")
    least, most = RANGES[view]
    if index is not None and not least <= index <= most:
        raise ValueError(f"{VIEWS[view].index} of a {view} phantom lies between {least} and {most}, got {index}")
    anatomy, film, noise = (_stream(view, style, seed, k) for k in (1, 2, 3))
    if index is None:
        index = drawn_index(view, style, seed, prior)
    canvas = Canvas(size_px)
    with _one_thread():
        attenuation, inside, points = ANATOMY[view](canvas, anatomy, index, style)
        grey = develop(canvas, attenuation, inside, random_film(film, style), noise)
        grey = surround(canvas, grey, (*points.min(0), *points.max(0)), style, film)
    pixels = canvas.pixels(points)
    return Phantom(np.round(np.clip(grey, 0, 1) * 255).astype(np.uint8), pixels, float(VIEWS[view].measure(pixels.astype(np.float64))))


def _arrays(seed: int, view: str, style: str, size_px: int, prior: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    phantom = draw(view, style, seed, size_px=size_px, prior=prior)
    return phantom.image, phantom.points


def draw_many(
    view: str, style: str, seeds: Sequence[int], size_px: int = 128, prior: Sequence[float] = EVEN, workers: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, S, S] and points float32 [N, K, 2] of `seeds`, in their order, the same for any number of worker processes."""
    seeds = [int(seed) for seed in seeds]
    one = partial(_arrays, view=view, style=style, size_px=size_px, prior=tuple(prior))
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            drawn = list(pool.map(one, seeds, chunksize=max(1, min(64, len(seeds) // (4 * workers)))))
    else:
        drawn = [one(seed) for seed in seeds]
    if not drawn:
        return np.zeros((0, size_px, size_px), np.uint8), np.zeros((0, len(VIEWS[view].points), 2), np.float32)
    images, points = zip(*drawn, strict=True)
    return np.stack(images), np.stack(points)

"""From drawn anatomy to a film: shapes to pixels, Beer-Lambert exposure, scatter, noise, collimator, markers, plate.

Shapes are polygons [n, 2] in units of the image's side, x right, y down, so that one anatomy can be rasterised at any number of pixels.
Only the photon noise is drawn per pixel; it has a random stream of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

OVERSAMPLE = 2  # polygons are filled at twice the resolution: thin vessels and ribs keep their width
SHIFT = 4  # fractional bits of OpenCV's polygon coordinates
BLACK = 0.02  # lead, air outside the collimated field


def smooth(points, rounds: int = 3, closed: bool = True) -> np.ndarray:
    """Chaikin's corner cutting [n, 2] -> [m, 2]: rounds corners and never leaves the hull of its points."""
    points = np.asarray(points, np.float64)
    for _ in range(rounds):
        following = np.roll(points, -1, 0) if closed else points[1:]
        here = points if closed else points[:-1]
        cut = np.stack([0.75 * here + 0.25 * following, 0.25 * here + 0.75 * following], 1).reshape(-1, 2)
        points = cut if closed else np.concatenate([points[:1], cut, points[-1:]])
    return points


def tube(curves, radius) -> np.ndarray:
    """Outlines [..., 2n, 2] of bands of `radius` (broadcast to [..., n]) about `curves` [..., n, 2]."""
    curves = np.asarray(curves, np.float64)
    along = np.gradient(curves, axis=-2)
    along /= np.linalg.norm(along, axis=-1, keepdims=True) + 1e-12
    side = np.stack([-along[..., 1], along[..., 0]], -1) * np.broadcast_to(radius, curves.shape[:-1])[..., None]
    return np.concatenate([curves + side, (curves - side)[..., ::-1, :]], axis=-2)


def disc(centre, radii, n: int = 24) -> np.ndarray:
    """Ellipse outline [n, 2]."""
    angle = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.asarray(centre) + np.stack([np.cos(angle), np.sin(angle)], 1) * np.asarray(radii)


class Canvas:
    """Rasterises shapes given in units of the side into float32 [S, S] fields."""

    def __init__(self, size_px: int):
        self.size_px = size_px
        centres = (np.arange(size_px, dtype=np.float32) + 0.5) / size_px
        self.x, self.y = centres[None, :], centres[:, None]

    def pixels(self, points) -> np.ndarray:
        """Side units -> pixels with centres at integers, float32."""
        return (np.asarray(points) * self.size_px - 0.5).astype(np.float32)

    def _fill(self, shapes, margin_px: int = 0) -> np.ndarray:
        fine = self.size_px * OVERSAMPLE
        layer = np.zeros((fine + 2 * margin_px, fine + 2 * margin_px), np.uint8)
        for polygons, value in shapes:
            polygons = np.asarray(polygons)
            corners = np.round((polygons * fine - 0.5 + margin_px) * (1 << SHIFT)).astype(np.int32)
            for corner in corners.reshape(-1, *polygons.shape[-2:]):  # one by one: a joint call would fill overlaps by the even-odd rule
                cv2.fillPoly(layer, [corner], round(255 * value), cv2.LINE_AA, SHIFT)
        return layer

    def _reduce(self, layer) -> np.ndarray:
        return cv2.resize(layer, (self.size_px, self.size_px), interpolation=cv2.INTER_AREA)

    def paint(self, shapes, blur: float = 0.0) -> np.ndarray:
        """Fill `shapes`, an iterable of (polygon [n, 2] or polygons [k, n, 2], value 0..1); later ones cover earlier ones."""
        return self.blur(self._reduce(self._fill(shapes)).astype(np.float32) / 255, blur)

    def solid(self, polygon, rounding: float, blur: float = 0.0) -> np.ndarray:
        """Thickness 0..1 of a body with this outline that rounds off over `rounding` from its border, as a projected organ does."""
        reach = rounding * self.size_px * OVERSAMPLE
        margin = int(np.ceil(reach))  # a border just outside the frame thins what is inside
        mask = self._fill([(polygon, 1.0)], margin)
        depth = cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 3)[margin:-margin, margin:-margin] / reach
        depth = 1 - np.minimum(depth, 1)
        return self.blur(self._reduce(np.sqrt(1 - depth * depth)), blur)

    def blur(self, field, sigma: float) -> np.ndarray:
        """Gaussian blur, `sigma` in units of the side."""
        sigma_px = sigma * self.size_px
        return field if sigma_px < 0.05 else cv2.GaussianBlur(field, (0, 0), sigma_px, borderType=cv2.BORDER_REPLICATE)

    def texture(self, rng, cells: int) -> np.ndarray:
        """Smooth noise of unit variance on a grid of cells x cells: the same blobs at any size."""
        grid = rng.standard_normal((cells, cells)).astype(np.float32)
        return cv2.resize(grid, (self.size_px, self.size_px), interpolation=cv2.INTER_CUBIC if cells < self.size_px else cv2.INTER_AREA)


@dataclass(frozen=True)
class Film:
    """Exposure and development of one film."""

    kilovoltage: float  # scales all attenuation: hard beams flatten contrast
    scatter: float  # share of the signal that is scattered
    photons: float  # behind no patient, per pixel of a film of 128 px: smaller pixels catch fewer
    focus: float  # blur of focal spot and detector, units of the side
    window: tuple[float, float]  # percentiles of the patient's density mapped to black and white
    lift: float  # share of the window added below black
    gamma: float
    contrast: float  # slope of the sigmoid curve at mid grey; 0 = straight


def random_film(rng, style: str) -> Film:
    """Exposure settings of a `style`: the textbook varies widely, the clinic has one harder-working machine."""
    u = rng.uniform
    if style == "textbook":
        return Film(
            kilovoltage=u(0.8, 1.2), scatter=u(0.03, 0.2), photons=np.exp(u(np.log(900), np.log(12000))), focus=u(0.002, 0.0055),
            window=(u(0.5, 5), u(98.5, 99.9)), lift=u(0, 0.35), gamma=u(0.75, 1.3), contrast=u(0, 2),
        )  # fmt: skip
    return Film(
        kilovoltage=u(0.9, 1.2), scatter=u(0.12, 0.28), photons=np.exp(u(np.log(1500), np.log(6000))), focus=u(0.0035, 0.006),
        window=(u(0.5, 3), u(99, 99.9)), lift=u(0.05, 0.2), gamma=u(1.0, 1.35), contrast=u(1.8, 3.4),
    )  # fmt: skip


def develop(canvas: Canvas, attenuation, inside, film: Film, noise) -> np.ndarray:
    """Film density 0..1 [S, S] of an attenuation map (Beer-Lambert), dense tissue bright. `inside` masks the patient."""
    light = np.exp(-attenuation * film.kilovoltage)
    light = (1 - film.scatter) * light + film.scatter * canvas.blur(light, 0.06)
    grain = noise.standard_normal(light.shape, dtype=np.float32)
    light = np.maximum(light + grain * np.sqrt(light / film.photons) * (canvas.size_px / 128), 2e-3)
    density = -np.log(canvas.blur(light, film.focus))
    step = max(1, canvas.size_px // 64)
    patient = density[::step, ::step][inside[::step, ::step] > 0.05]
    low, high = np.percentile(patient, film.window)
    low -= film.lift * (high - low)
    grey = np.clip((density - low) / (high - low + 1e-6), 0, 1) ** film.gamma
    if film.contrast:
        edge = np.tanh(film.contrast / 4)
        grey = 0.5 + 0.5 * np.tanh(film.contrast * (grey - 0.5) / 2) / edge
    return grey.astype(np.float32)


def _text(canvas: Canvas, grey, text: str, at, height: float, value: float) -> np.ndarray:
    """`grey` with `text` in `value`, its lower left corner at `at`; Hershey capitals are 21 units tall at scale 1."""
    scale = height * canvas.size_px / 21
    ink = np.zeros(grey.shape, np.uint8)
    corner = tuple(int(round(v * canvas.size_px)) for v in at)
    cv2.putText(ink, text, corner, cv2.FONT_HERSHEY_SIMPLEX, scale, 255, max(1, round(1.6 * scale)), cv2.LINE_AA)
    ink = ink.astype(np.float32) / 255
    return grey * (1 - ink) + value * ink


def surround(canvas: Canvas, grey, keep, style: str, rng, letters: str = "LR") -> np.ndarray:
    """Collimator, side marker and, in the clinic, round mask and burnt-in plate. `keep` = (x0, y0, x1, y1) stays inside the collimator."""
    u = rng.uniform
    x0, y0, x1, y1 = keep
    clinic = style == "clinic"
    turn, level, shown = np.deg2rad(u(-1.7, 1.7)), u(0, 0.05), rng.random() < (0.9 if clinic else 0.5)
    left, right, top, bottom = (min(u(0.0, 0.07), room) for room in (x0 - 0.03, 0.97 - x1, y0 - 0.03, 0.97 - y1))
    letter, corner, height, bright = letters[int(rng.integers(len(letters)))], int(rng.integers(4)), u(0.055, 0.095), u(0.85, 1.0)
    inset, marked, plate_left = u(0.02, 0.08), rng.random() < (0.9 if clinic else 0.6), rng.random() < 0.5
    number = int(rng.integers(1000, 9999))
    if shown:
        dx, dy = canvas.x - 0.5, canvas.y - 0.5
        xr, yr = dx * np.cos(turn) + dy * np.sin(turn) + 0.5, dy * np.cos(turn) - dx * np.sin(turn) + 0.5
        gap = np.minimum(np.minimum(xr - left, 1 - right - xr), np.minimum(yr - top, 1 - bottom - yr))
        if clinic:
            gap = np.minimum(gap, 0.67 - np.hypot(dx, dy))  # round image intensifier
        field = np.clip(gap * canvas.size_px + 0.5, 0, 1)
        grey = grey * field + (1 - field) * (BLACK if clinic else level)
    if marked:
        at = (inset if corner % 2 else 0.93 - inset, inset + height if corner < 2 else 0.97 - inset / 2)
        grey = _text(canvas, grey, letter, at, height, bright)
    if clinic:
        at = (0.0 if plate_left else 0.78, 0.945)
        px = canvas.size_px
        grey[int(at[1] * px) :, int(at[0] * px) : int((at[0] + 0.22) * px)] = 0.92
        grey = _text(canvas, grey, str(number), (at[0] + 0.02, 0.985), 0.028, 0.1)
    return grey

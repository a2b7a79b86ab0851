"""A human chest film, postero-anterior: the patient's right is on the image's left, with the four points of the cardiothoracic ratio.

Lungs first: their outermost vertices are the thorax points. Then a heart outline whose width is set to `index` times theirs, its outermost
vertices being the heart points, stands on the diaphragm. Both are found after the patient's rotation, so the drawn CTR is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vhs.phantom_film import Canvas, disc, smooth, tube

# Inner border of the rib cage: height below the lung's apex, half width.
BORDER = np.array([[0.0, 0.2], [0.0, 0.42], [0.07, 0.62], [0.18, 0.78], [0.36, 0.9], [0.55, 0.97], [0.74, 1.02], [0.9, 1.03], [1.0, 0.98]])
# Outline of the heart: x from the right to the left border, y from the great vessels to the apex.
HEART = np.array([
    [-0.3, -0.05], [-0.5, 0.08], [-0.82, 0.28], [-1.02, 0.52], [-1.0, 0.76], [-0.7, 1.02], [-0.1, 1.12],
    [0.5, 1.1], [0.92, 1.0], [1.06, 0.82], [0.9, 0.6], [0.6, 0.34], [0.42, 0.16], [0.3, -0.05],
])  # fmt: skip
BLOCK = ((-0.11, 0), (0.11, 0), (0.1, 0.037), (0.11, 0.074), (-0.11, 0.074), (-0.1, 0.037))  # one vertebra


@dataclass(frozen=True)
class Habitus:
    """Ranges in which the patients of a style differ (units of the side)."""

    width: tuple[float, float]
    height: tuple[float, float]
    apex: tuple[float, float]
    dome: tuple[float, float]
    fat: tuple[float, float]
    rib: tuple[float, float]


HABITUS = {
    "textbook": Habitus((0.68, 0.84), (0.56, 0.74), apex=(0.07, 0.16), dome=(0.09, 0.17), fat=(0.03, 0.08), rib=(0.009, 0.014)),
    "clinic": Habitus((0.62, 0.78), (0.46, 0.6), apex=(0.1, 0.2), dome=(0.08, 0.14), fat=(0.06, 0.13), rib=(0.011, 0.017)),
}


class Chest:
    """Lungs, heart and the four key points, in units of the side."""

    def __init__(self, rng, index: float, style: str):
        u, self.habitus = rng.uniform, HABITUS[style]
        self.half, self.height, self.apex = u(*self.habitus.width) / 2, u(*self.habitus.height), u(*self.habitus.apex)
        room = 0.45 - 1.03 * self.half  # what the mid line may wander: wide and turned, the thorax still keeps 3% to the frame
        self.middle = 0.5 + np.clip(u(-0.05, 0.05), -room, room)
        self.turn = np.deg2rad(u(-2.5, 2.5))
        self.waist = np.array([0, u(-0.03, 0.02), u(-0.05, 0.03), u(-0.04, 0.03), u(-0.03, 0.03), 0, 0, 0, u(-0.05, 0.01)])
        self.width = (1 - u(0, 0.05), 1 - u(0, 0.05))
        self.domes = [self._dome(rng, side) for side in (-1, 1)]
        self.lungs = [self._lung(rng, side) for side in (-1, 1)]
        thorax = [self.lungs[0][self.lungs[0][:, 0].argmin()], self.lungs[1][self.lungs[1][:, 0].argmax()]]
        self.heart = self._heart(rng, index * (thorax[1][0] - thorax[0][0]))
        self.points = np.stack([self.heart[self.heart[:, 0].argmin()], self.heart[self.heart[:, 0].argmax()], *thorax])

    def place(self, points) -> np.ndarray:
        """From (x in half widths, y in lung heights) to the image, the patient's rotation included."""
        points = np.asarray(points, np.float64) * [self.half, self.height] + [0, self.apex]
        x, y = points[..., 0], points[..., 1] - 0.5
        cos, sin = np.cos(self.turn), np.sin(self.turn)
        return np.stack([self.middle + x * cos - y * sin, 0.5 + x * sin + y * cos], -1)

    def border(self, y, side: int) -> np.ndarray:
        """Half width of the inner rib cage at height `y`."""
        return np.interp(y, BORDER[:, 0], BORDER[:, 1] + self.waist) * self.width[side > 0]

    def _dome(self, rng, side: int) -> np.ndarray:
        """Diaphragm from the costophrenic angle to the mid line [n, 2]; the left one stands lower."""
        u = rng.uniform
        rise, low, top = u(*self.habitus.dome) / self.height, u(0.0, 0.05) + 0.03 * (side > 0), u(0.4, 0.56)
        foot = float(self.border(1.0, side))
        knots = [[foot, 1 + low], [foot - 0.06, 1 + low - 0.35 * rise], [top + 0.24, 1 + low - 0.86 * rise], [top, 1 + low - 1.1 * rise],
                 [top - 0.2, 1 + low - 1.0 * rise], [0.05, 1 + low - 0.62 * rise]]  # fmt: skip
        return smooth(knots, 3, closed=False) * [side, 1]

    def _lung(self, rng, side: int) -> np.ndarray:
        u = rng.uniform
        lateral = np.stack([side * (BORDER[:, 1] + self.waist) * self.width[side > 0], BORDER[:, 0]], 1)[1:-1]
        medial = np.array([[0.06, 0.7], [u(0.07, 0.12), 0.4], [u(0.1, 0.16), 0.18], [0.2, 0.03]]) * [side, 1]
        return self.place(smooth(np.concatenate([lateral, self.domes[side > 0][::3], medial]), 3))

    def _heart(self, rng, width: float) -> np.ndarray:
        u = rng.uniform
        outline = HEART + rng.normal(0, 0.025, HEART.shape)
        lean, tall = u(0.3, 0.39), np.clip(0.62 * width + u(0.1, 0.17), 0.2, 0.42) / self.height
        outline = self.place(smooth(outline * [0.5 * width / self.half, tall], 3))
        outline[:, 0] -= outline[:, 0].min()
        outline[:, 0] *= width / outline[:, 0].max()
        outline[:, 0] += self.middle - lean * width
        apex = outline[outline[:, 0].argmax()]
        dome = self.place(self.domes[1])
        outline[:, 1] += np.interp(apex[0], dome[::-1, 0], dome[::-1, 1]) - u(0.005, 0.055) - apex[1]  # the apex stays above the diaphragm
        return outline


def _ribs(rng, c: Chest) -> tuple[np.ndarray, np.ndarray]:
    """Posterior [2 x 9, n, 2] and anterior [2 x 7, n, 2] ribs: one arch each from spine to rib cage and back to the front."""
    u = rng.uniform
    f = np.linspace(0, 1, 16)
    start, pitch, hump, fall = u(-0.04, 0.02), u(0.098, 0.112), u(0.02, 0.05), u(0.08, 0.16)
    sink, reach = u(0.12, 0.22), u(0.4, 0.55)
    back, front = [], []
    for side in (-1, 1):
        for number in range(9):
            y = start + pitch * number - hump * np.sin(np.pi * np.minimum(1.4 * f, 1)) + (fall + 0.006 * number) * f**2.2
            back.append(np.stack([side * (0.07 + (c.border(y[-1], side) - 0.05) * np.sin(0.5 * np.pi * f) ** 0.9), y], -1))
            if number < 7:
                x = c.border(y[-1], side) * (1.0 - reach * (1 - np.cos(0.5 * np.pi * f)) - 0.12 * f)
                front.append(np.stack([side * x, y[-1] + (sink + 0.01 * number) * np.sin(0.5 * np.pi * f)], -1))
    wide = u(*c.habitus.rib)
    return tube(c.place(back), wide * (0.75 + 0.35 * f)), tube(c.place(front), wide * (1.1 - 0.1 * f))


def _shoulders(rng, c: Chest) -> list:
    """Clavicles and the medial borders of the shoulder blades."""
    u, shapes = rng.uniform, []
    for side in (-1, 1):
        inner, outer = np.array([0.1, u(0.1, 0.18)]), np.array([u(0.8, 0.95), u(-0.04, 0.08)])
        knots = [inner, 0.65 * inner + 0.35 * outer + [0, u(0, 0.03)], 0.3 * inner + 0.7 * outer - [0, u(0, 0.04)], outer]
        shapes.append((tube(c.place(smooth(np.array(knots) * [side, 1], 2, closed=False)), u(0.012, 0.018)), 0.85))
        blade = np.array([[u(0.82, 0.98), 0.02], [u(0.84, 1.0), 0.25], [u(0.92, 1.08), 0.5]]) * [side, 1]
        shapes.append((tube(c.place(smooth(blade, 2, closed=False)), 0.012), 0.35))
    return shapes


def _vessels(rng, c: Chest) -> list:
    """Branches of the pulmonary arteries, thick at the hilum, more and wider below."""
    u, reach, shapes = rng.uniform, np.linspace(0, 1, 7), []
    for side in (-1, 1):
        hilum = np.array([side * u(0.2, 0.28), u(0.44, 0.54)])
        n = int(rng.integers(12, 18))
        angle = np.deg2rad(np.linspace(-70, 88, n) + rng.normal(0, 6, n))
        long, curl, thick = u(0.22, 0.55, n), u(-0.5, 0.5, n), u(0.004, 0.01, n)
        bend = angle[:, None] + curl[:, None] * reach
        curve = hilum + long[:, None, None] * reach[:, None] * np.stack([side * np.cos(bend), np.sin(bend)], -1)
        shapes += [(o, 0.3 + 35 * w) for o, w in zip(tube(c.place(curve), thick[:, None] * (1 - 0.75 * reach)), thick, strict=True)]
        shapes.append((disc(c.place(hilum), [u(0.015, 0.03), u(0.025, 0.05)]), 0.6))
    return shapes


def _mediastinum(rng, c: Chest) -> list:
    """Superior vena cava, ascending aorta, aortic knob and descending aorta, pulmonary trunk."""
    u = rng.uniform
    knob = np.array([u(0.16, 0.26), u(0.26, 0.34)])
    stem = np.array([[u(-0.05, 0.05), -0.2], [0, 0.1], [u(-0.04, 0.02), 0.35], [0, 0.75]])
    cava = np.array([[-u(0.1, 0.18), 0.08], [-u(0.14, 0.2), 0.4], [-u(0.12, 0.18), 0.6]])
    return [
        (tube(c.place(smooth(stem, 2, closed=False)), u(0.13, 0.19) * c.half), 0.8), (tube(c.place(cava), 0.06 * c.half), 0.7),
        (disc(c.place(knob), u(0.032, 0.05)), 0.85), (tube(c.place([knob, [knob[0] - 0.02, 0.5], [0.08, 0.95]]), u(0.02, 0.032)), 0.75),
        (disc(c.place(knob + [0.01, u(0.12, 0.16)]), u(0.03, 0.045)), 0.7),
    ]


def _torso(rng, c: Chest) -> np.ndarray:
    """Skin: neck, shoulders with the arms turned out, flanks."""
    u = rng.uniform
    halves = []
    for side in (-1, 1):
        flank = 1.03 + u(*c.habitus.fat) / c.half
        halves.append(np.array([
            [u(0.2, 0.28), -0.6], [u(0.22, 0.32), -0.12], [u(0.6, 0.8), u(-0.14, -0.04)], [u(1.2, 1.5), u(-0.08, 0.06)], [2.4, u(0.2, 0.6)],
            [2.4, u(0.7, 1.2)], [u(1.12, 1.3) * flank, u(0.4, 0.6)], [flank, u(0.6, 0.75)], [flank * u(0.96, 1.0), 1.0],
            [flank * u(0.92, 1.1), 2.0],
        ]) * [side, 1])  # fmt: skip
    return c.place(smooth(np.concatenate([halves[0], halves[1][::-1]]), 3))


def attenuation(canvas: Canvas, rng, index: float, style: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One patient -> attenuation [S, S] in units of exp(-1), patient mask [S, S], the four key points [4, 2] in units of the side."""
    u = rng.uniform
    c = Chest(rng, index, style)
    width = c.points[1, 0] - c.points[0, 0]
    body = canvas.solid(_torso(rng, c), 0.3, 0.006)
    lung = sum(canvas.solid(o, u(0.07, 0.12), 0.004) for o in c.lungs) * body * u(0.54, 0.68)
    heart = canvas.solid(c.heart, 0.32 * width, u(0.005, 0.01)) * u(0.42, 0.6)
    mediastinum = canvas.paint(_mediastinum(rng, c), 0.009) * u(0.4, 0.55)
    vessels = canvas.paint(_vessels(rng, c), 0.003) * u(0.08, 0.18)
    trachea = tube(c.place([[u(-0.03, 0.03), -0.4], [0.0, 0.1], [-0.03, 0.36]]), u(0.016, 0.024))
    airway = canvas.paint([(trachea, 1.0)], 0.006) * u(0.08, 0.16)
    texture = canvas.texture(rng, 60) * u(0.01, 0.03) + canvas.texture(rng, 12) * u(0.01, 0.04)
    filled = np.minimum(np.maximum(heart, mediastinum) + vessels, lung)
    bubble = (disc(c.place([u(0.3, 0.6), 1 + u(0.02, 0.14)]), [u(0.03, 0.08), u(0.02, 0.05)]), u(0.2, 1.0) * (rng.random() < 0.6))
    abdomen = canvas.paint([bubble], 0.012) * 0.22 * (lung < 0.1)
    breast = [(disc(c.place([side * u(0.45, 0.6), u(0.72, 0.95)]), [u(0.11, 0.17), u(0.1, 0.16)]), 1.0) for side in (-1, 1)]
    breasts = canvas.paint(breast, u(0.006, 0.02)) * u(0.03, 0.14) * (rng.random() < 0.5)
    soft = body * (1 + texture) - lung * (1 + 0.6 * texture) + filled - abdomen - np.minimum(airway, 0.5 * body) + breasts * body
    back, front = _ribs(rng, c)
    level = np.arange(-0.2, 1.5, 0.092)
    blocks = np.stack([np.stack([np.full_like(level, x), level + y], -1) for x, y in BLOCK], 1)
    bone = canvas.paint([(c.place(blocks), 1.0)], 0.003) * u(0.08, 0.2) + canvas.paint([(back, 1.0)], 0.003) * u(0.14, 0.3)
    bone = bone + canvas.paint([(front, 1.0)], 0.004) * u(0.07, 0.18) + canvas.paint(_shoulders(rng, c), 0.004) * u(0.25, 0.5)
    return 2.6 * np.maximum(soft, 0) + 0.9 * bone * (body > 0.02), body, c.points

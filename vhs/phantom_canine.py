"""A dog's thorax in right lateral view, head to the left, with the six points of the Vertebral Heart Size.

The anatomy is laid out in vertebral units in a frame where E-F is horizontal, then turned, scaled and shifted into the image as a whole,
so lengths keep their ratios and the drawn VHS is exact. The heart comes first; sternum, diaphragm and body are built around it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vhs.phantom_film import Canvas, disc, smooth, tube

FIRST, LAST = -4, 19  # vertebrae drawn: T1 is 1, T13 is 13


@dataclass(frozen=True)
class Habitus:
    """Ranges in which the dogs of a style differ (vertebral units, degrees)."""

    tilt: tuple[float, float]
    unit: tuple[float, float]
    chest: tuple[float, float]
    axis: tuple[float, float]
    rib: tuple[float, float]
    fat: tuple[float, float]


HABITUS = {
    "textbook": Habitus(tilt=(-18, 5), unit=(0.054, 0.072), chest=(6.6, 9.2), axis=(46, 68), rib=(0.13, 0.2), fat=(0.6, 1.6)),
    "clinic": Habitus(tilt=(-24, -8), unit=(0.05, 0.064), chest=(6.2, 7.8), axis=(40, 60), rib=(0.16, 0.24), fat=(1.2, 2.4)),
}


class Spine:
    """Centre line of the vertebrae, in units from the cranial edge of T4; `body`: half a vertebra's height, `gap`: a disc's width."""

    def __init__(self, rng):
        number = np.arange(FIRST, LAST)
        self.number = np.arange(FIRST, LAST + 1)
        length = (0.97 + 0.012 * (number - 6)) * (1 + rng.normal(0, 0.012, len(number)))
        bend = np.deg2rad(rng.normal(1.0, 0.5)) * (number - 7) + np.deg2rad(rng.uniform(-3, 9)) * np.maximum(0, 2 - number)
        step = np.stack([np.cos(bend), np.sin(bend)], 1) * length[:, None]
        edges = np.concatenate([np.zeros((1, 2)), np.cumsum(step, 0)])
        edges -= edges[4 - FIRST]
        angle = np.arctan2(*edges[10 - FIRST][::-1])
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.edges = edges @ turn
        along = np.gradient(self.edges, axis=0)
        along /= np.linalg.norm(along, axis=1, keepdims=True)
        self.ventral = np.stack([-along[:, 1], along[:, 0]], 1)
        self.body, self.gap = rng.uniform(0.36, 0.45), rng.uniform(0.14, 0.24)

    def at(self, t, depth=0.0) -> np.ndarray:
        """Places [..., 2] at vertebra numbers `t` [...] (4.0 = cranial edge of T4), `depth` units ventral of the centre line."""
        centre, ventral = (np.stack([np.interp(t, self.number, v[:, i]) for i in (0, 1)], -1) for v in (self.edges, self.ventral))
        return centre + ventral * np.asarray(depth)[..., None]


def _heart(rng, index: float, spine: Spine, habitus: Habitus) -> tuple[np.ndarray, np.ndarray]:
    """Points A..F [6, 2] and the heart's outline [n, 2]: four superellipse quarters that meet at right angles on both axes."""
    u = rng.uniform
    e, f = spine.at(4, spine.body), spine.at(10, spine.body)
    total = index * np.linalg.norm(f - e) / 6
    ratio = np.clip(0.77 + 0.02 * (index - 9) + rng.normal(0, 0.045), 0.62, 0.95)  # round hearts are large hearts
    long, short = total / (1 + ratio), total * ratio / (1 + ratio)
    axis = np.deg2rad(u(*habitus.axis))
    down, cranial = np.array([np.cos(axis), np.sin(axis)]), np.array([-np.sin(axis), np.cos(axis)])
    waist, lean = u(0.4, 0.52), u(0.45, 0.55)
    depth = np.clip(u(*habitus.chest) - 0.4 - 0.97 * long, 1.3, 3.3)  # a small heart hangs lower: it rests on the sternum, not in mid-air
    a = np.array([spine.at(u(4.9, 6.0))[0], spine.body + depth])
    b, middle = a + long * down, a + waist * long * down
    c, d = middle + lean * short * cranial, middle - (1 - lean) * short * cranial
    quarter = np.linspace(0, np.pi / 2, 14)[:-1]
    outline = []
    for start, end, power in ((b, c, u(1.75, 2.2)), (c, a, u(1.9, 2.5)), (a, d, u(1.9, 2.4)), (d, b, u(1.8, 2.3))):
        share, rest = np.cos(quarter) ** (2 / power), np.sin(quarter) ** (2 / power)
        outline.append(middle + np.outer(share, start - middle) + np.outer(rest, end - middle))
    return np.stack([a, b, c, d, e, f]), np.concatenate(outline)


class Thorax:
    """The dog in vertebral units, and `place`, which puts it into the image."""

    def __init__(self, rng, index: float, style: str):
        u, self.habitus = rng.uniform, HABITUS[style]
        self.spine = Spine(rng)
        self.points, self.heart = _heart(rng, index, self.spine, self.habitus)
        self.slope, self.bend, self.floor = u(0.1, 0.36), u(0.03, 0.06), 0.0
        self.floor = (self.heart[:, 1] - self.sternum(self.heart[:, 0])).max() + u(0.02, 0.5)  # the heart all but touches the sternum
        self.manubrium = self.spine.at(u(0.2, 1.8))[0]
        tilt, unit = np.deg2rad(u(*self.habitus.tilt)), u(*self.habitus.unit)
        self.turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
        ground = np.array([[x, self.sternum(x) + 0.3] for x in (self.points[0, 0], self.points[1, 0])])
        shown = np.concatenate([self.points, ground, self.spine.at([4, 10], -1.0)]) @ self.turn
        low, high = shown.min(0), shown.max(0)
        self.unit = min(unit, 0.88 / (high - low).max())
        room = 0.94 - self.unit * (high - low)  # shift within the frame, a margin of 3% on either side
        self.offset = 0.03 + room * np.clip([0.36 + u(-0.16, 0.16), 0.48 + u(-0.2, 0.2)], 0, 1) - self.unit * low

    def sternum(self, x):
        """Depth of the sternum at `x`: a line that bends dorsally towards the manubrium."""
        return self.floor + self.slope * x - self.bend * np.minimum(np.asarray(x) - self.points[0, 0], 0) ** 2

    def place(self, points) -> np.ndarray:
        return self.offset + self.unit * (np.asarray(points) @ self.turn)


def _lungs(rng, t: Thorax) -> list[np.ndarray]:
    """Outlines of both lungs, which differ by the crus of the diaphragm behind them."""
    u, spine = rng.uniform, t.spine
    a, b, _, d = t.points[:4]
    crus, foot, bulge, cranial = u(11.6, 13.4), b[0] + u(0.0, 1.8), u(0.3, 1.3), u(0.0, 0.8)
    height = np.linspace(0, 1, 12)
    outlines = []
    for shift in (0.0, u(0.2, 0.9)):
        top, base = spine.at(crus + 0.4 * shift, spine.body), np.array([foot + shift, t.sternum(foot + shift)])
        dome = top + height[:, None] * (base - top) - np.outer(np.sin(np.pi * height**1.2), [bulge, 0])
        beside = np.interp(d[1], dome[:, 1], dome[:, 0])
        dome[:, 0] += max(0.0, d[0] + 0.15 - beside) * np.clip(2.2 * height, 0, 1)  # the caudal border of the heart stays in the lung
        floor = np.linspace(dome[-1, 0], t.manubrium + 0.5, 9)
        ventral = np.stack([floor, t.sternum(floor)], 1)
        inlet = [[t.manubrium - 0.1, t.sternum(t.manubrium) - 1.0], spine.at(1.0, 1.8 + cranial), spine.at(1.9, 0.5)]
        outlines.append(smooth(np.concatenate([spine.at(np.linspace(2.6, crus - 0.3, 9), 0.3), dome, ventral, inlet]), 2))
    return outlines


def _body(rng, t: Thorax) -> np.ndarray:
    """Skin: withers, back, belly, neck."""
    u, spine = rng.uniform, t.spine
    back = spine.at(np.array([-6, -2, 1, 3, 6, 10, 14, 24]), -np.array([1.9, 2.4, 3.2, 3.4, 3.0, 2.6, 2.4, 2.4]) * u(0.8, 1.05))
    back[-1] += [9, u(-0.5, 1.5)]
    x = np.array([back[-1, 0], t.points[1, 0] + 4, t.points[1, 0], t.points[0, 0], t.manubrium - 0.8])
    belly = np.stack([x, t.sternum(x) + u(*t.habitus.fat)], 1)
    belly[0, 1] += u(-4.5, 0.2)
    belly[1, 1] += u(-0.8, 0.2)
    front = back[0, 0] - 9  # beyond the image
    chest = [t.manubrium - 3.5, t.sternum(t.manubrium) - u(0.5, 2.2)]
    throat = np.array([chest, [front, spine.at(-5)[1] + u(3.5, 6)], [front, back[0, 1] + u(-2, 1)]])
    return smooth(np.concatenate([back, belly, throat]), 3)


def _vertebrae(rng, t: Thorax) -> list:
    """Bodies with dense end plates, arches, spinous processes."""
    spine, u = t.spine, rng.uniform
    number = np.arange(FIRST, LAST)
    head, tail = number + spine.gap / 2, number + 1 - spine.gap / 2
    dorsal = -spine.body

    def block(shrink):
        a, b = head + shrink, tail - shrink
        deep = spine.body - shrink
        middle = (a + b) / 2
        corners = ((a, -deep), (middle, -0.88 * deep), (b, -deep), (b, deep), (middle, 0.88 * deep), (a, deep))  # bodies have a waist
        return t.place(np.stack([spine.at(*corner) for corner in corners], 1))

    lean, tall = u(0.5, 1.3), u(1.9, 2.7)
    height = np.where(number < 1, 0.8, np.clip(tall - 0.13 * (number - 3), 0.9, tall))
    tip = np.where(number < 11, lean, -0.3) * height / 2.2
    base, crown = number + 0.5, number + 0.7 + tip
    reach = np.linspace(0, 1, 4)
    process = spine.at(base[:, None] + (crown - base)[:, None] * reach, dorsal - 0.3 - height[:, None] * reach)
    arch = spine.at(np.stack([head + 0.1, base, tail + 0.25], 1), dorsal - np.array([0.3, 0.5, 0.25]))
    return [
        (tube(t.place(process), 0.21 * t.unit), 0.3), (tube(t.place(arch), 0.26 * t.unit), 0.34), (block(0.0), 0.85), (block(0.13), 0.52),
    ]


def _ribs(rng, t: Thorax) -> list[np.ndarray]:
    """Both rows of ribs [13, n, 2]; the far row is displaced a little."""
    u, spine = rng.uniform, t.spine
    number = np.arange(1, 14)
    f = np.linspace(0, 1, 14)
    slant, bow = u(0.05, 0.3), u(0.06, 0.24)
    rows = []
    for side in (0, 1):
        start = spine.at(number + 0.1) + side * np.array([u(-0.4, 0.4), u(-0.1, 0.25)])
        drop = (t.sternum(start[:, 0] + 1.5) - start[:, 1]) * (1 + 0.04 * side)
        drop *= np.where(number < 10, 0.62 + 0.025 * number, 0.86 - 0.07 * (number - 9))
        back = slant * (0.3 + 0.09 * number)[:, None] * f + bow * (0.5 + 0.07 * number)[:, None] * np.sin(np.pi * f) - 0.08 * f**3
        rows.append(t.place(start[:, None] + drop[:, None, None] * np.stack([back, np.broadcast_to(f, back.shape)], -1)))
    return [tube(row, t.unit * t.habitus.rib[0] * (0.8 + 0.35 * f) * u(1.0, t.habitus.rib[1] / t.habitus.rib[0])) for row in rows]


def _forelimb(rng, t: Thorax) -> tuple[list, list]:
    """Soft and bony outlines of the forelimbs, drawn forward, partly over the cranial thorax."""
    u = rng.uniform
    soft, bone = [], []
    for _ in range(2):
        shoulder = np.array([t.manubrium - u(0.4, 2.4), t.sternum(t.manubrium) - u(0.6, 2.6)])
        elbow, top = shoulder + [u(-3.5, 0.5), u(3.5, 6)], shoulder + [u(0.8, 2.6), -u(4.0, 5.5)]
        humerus, scapula = np.linspace(shoulder, elbow, 5), np.linspace(shoulder, top, 5)
        soft += [(tube(t.place(scapula), t.unit * u(1.2, 2.0)), 0.6), (tube(t.place(humerus), t.unit * u(1.2, 1.9)), 1.0)]
        bone += [(tube(t.place(scapula), t.unit * np.linspace(0.35, 0.9, 5)), 0.3), (tube(t.place(scapula), t.unit * 0.12), 0.55)]
        bone += [(tube(t.place(humerus), t.unit * np.array([0.7, 0.5, 0.42, 0.45, 0.6])), 0.75)]
        bone += [(disc(t.place(shoulder), 0.62 * t.unit), 0.8)]
    return soft, bone


def _vessels(rng, t: Thorax) -> list:
    """Lobar vessels that leave the heart's base, the caudal vena cava and the aorta."""
    u, (a, b, _, d) = rng.uniform, t.points[:4]
    hilus, reach = a + 0.16 * (b - a), np.linspace(0, 1, 7)
    angle = np.deg2rad(np.concatenate([u(-32, 58, 11), u(150, 205, 4)]))
    long, curl, thick = u(2.5, 6.5, 15), u(-0.3, 0.3, 15), u(0.11, 0.24, 15)
    bend = angle[:, None] + curl[:, None] * reach
    curve = hilus + long[:, None, None] * reach[:, None] * np.stack([np.cos(bend), np.sin(bend)], -1)
    lobar = tube(t.place(curve), t.unit * thick[:, None] * (1 - 0.8 * reach))
    shapes = [(outline, 0.35 + 1.2 * w) for outline, w in zip(lobar, thick, strict=True)]
    cava = np.linspace(d + 0.1 * (b - a), [d[0] + u(3, 5), d[1] + u(-0.3, 0.9)], 5)
    arch = np.concatenate([[a + [0.1, 0.5]], t.spine.at([6.4, 7.6, 9.5, 12, 14], t.spine.body + np.array([1.3, 0.75, 0.6, 0.6, 0.6]))])
    aorta = tube(t.place(smooth(arch, 2, closed=False)), t.unit * u(0.4, 0.55))
    return [(aorta, 0.5), (tube(t.place(cava), t.unit * u(0.3, 0.42)), 0.55), *shapes]


def _airway(rng, t: Thorax) -> np.ndarray:
    """Trachea from the neck to the carina at A, and two main bronchi."""
    u, a = rng.uniform, t.points[0]
    start = t.spine.at(FIRST, u(1.6, 3.0)) - [5, 0]
    middle = t.spine.at(2.0, t.spine.body + u(1.0, 2.0))
    course = smooth([start, middle, 0.5 * (middle + a) + [0, -0.2], a + [0, -0.1]], 3, closed=False)
    wide = t.unit * u(0.32, 0.46)
    split = [np.linspace(a, a + u(1.0, 2.0) * np.array([np.cos(v), np.sin(v)]), 4) for v in np.deg2rad([u(0, 25), u(30, 60)])]
    return [(tube(t.place(course), wide), 1.0), *((tube(t.place(s), wide * np.linspace(0.7, 0.3, 4)), 0.7) for s in split)]


def attenuation(canvas: Canvas, rng, index: float, style: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One dog -> attenuation [S, S] in units of exp(-1), patient mask [S, S], key points A..F [6, 2] in units of the side."""
    u = rng.uniform
    t = Thorax(rng, index, style)
    a, b, c, d = t.points[:4]
    short = np.linalg.norm(c - d) * t.unit
    fore_soft, fore_bone = _forelimb(rng, t)
    body = canvas.solid(t.place(_body(rng, t)), 4.2 * t.unit, 0.004)
    lung = sum(0.5 * canvas.solid(t.place(o), u(1.6, 2.6) * t.unit, 0.005) for o in _lungs(rng, t)) * body * u(0.7, 0.82)
    heart = canvas.solid(t.place(t.heart), 0.5 * short, u(0.004, 0.009)) * u(0.42, 0.6)
    forward = np.linspace(t.place(0.7 * a + 0.3 * c), t.place([t.manubrium, a[1] + u(-0.2, 1.2)]), 5)
    cranial = [(tube(forward, t.unit * u(0.8, 1.3)), 1.0), (disc(t.place(a + [u(0, 0.5), 0.5]), t.unit * u(0.8, 1.2)), u(0.4, 0.9))]
    mediastinum = canvas.paint(cranial, 0.35 * t.unit) * u(0.1, 0.3)
    vessels = canvas.paint(_vessels(rng, t), 0.004) * u(0.12, 0.24)
    airway = canvas.paint(_airway(rng, t), 0.05 * t.unit) * u(0.12, 0.24)
    texture = canvas.texture(rng, 56) * u(0.01, 0.03) + canvas.texture(rng, 14) * u(0.01, 0.04)
    filled = np.minimum(np.maximum(heart, mediastinum) + vessels, lung)
    bowel = [disc(t.place([b[0] + u(2.5, 6), u(3, 6)]), t.unit * u((0.7, 0.6), (2.2, 1.4))) for _ in range(2)]
    gut = [(outline, u(0.2, 1.0) * (rng.random() < 0.7)) for outline in bowel]
    gas = canvas.paint(gut, 0.25 * t.unit) * 0.16 * (lung < 0.1)
    limb = canvas.paint(fore_soft, 0.5 * t.unit) * 0.28 * u(0.5, 1.2)
    soft = body * (1 + texture) - lung * (1 + 0.6 * texture) + filled - gas - np.minimum(airway, 0.5 * body)
    near, far = _ribs(rng, t)
    sternebrae = np.arange(t.manubrium, b[0] + 4, 1.25)
    bars = np.stack([np.stack([sternebrae + k, t.sternum(sternebrae + k) + 0.35], -1) for k in (-0.45, 0.0, 0.45)], 1)
    bone = canvas.paint(_vertebrae(rng, t), 0.0035) * u(0.8, 1.15)
    bone = bone + canvas.paint([(near, 1.0)], 0.003) * u(0.12, 0.26) + canvas.paint([(far, 1.0)], 0.006) * u(0.06, 0.16)
    bone = bone + canvas.paint([(tube(t.place(bars), 0.3 * t.unit), 1.0)], 0.004) * u(0.2, 0.45)
    bone = bone + canvas.paint(fore_bone, 0.004) * u(0.4, 0.8)
    return 2.6 * (np.maximum(soft, 0) + limb) + 0.9 * bone, body, t.place(t.points)

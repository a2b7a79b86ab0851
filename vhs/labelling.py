"""Images -> key points -> index, with a reason to believe it or not.

A labeller is a key-point network, the view it measures, and the thresholds fitted on the images it learnt from. It labels by measuring: no
class is ever predicted, it follows from the index. Each measurement carries three doubts: the index's spread over Monte-Carlo dropout
passes, the width of the heat maps, and the distance of the image's features from those of the training images. `verdict` turns them into
accepted or a reason.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from sklearn.covariance import LedoitWolf
from torch.nn import functional as F

from vhs import checkpoint, radiograph, settings, training
from vhs.measure import VIEWS, View
from vhs.networks import KeypointNet


@dataclass(frozen=True)
class Measurement:
    """What a labeller saw in N images of side `side_px`.

    points float32 [N, K, 2] in the images' own pixels; index float64 [N] (not finite where the points are degenerate); spread float64 [N],
    the index's standard deviation over the dropout passes; peak float64 [N], the widest heat map's standard deviation in network pixels;
    features float32 [N, C], the bottleneck's mean.
    """

    side_px: int
    points: np.ndarray
    index: np.ndarray
    spread: np.ndarray
    peak: np.ndarray
    features: np.ndarray


@dataclass(frozen=True)
class Thresholds:
    """The largest doubt accepted of each kind, and the training images' features: mean [C] and inverse covariance [C, C]."""

    quantile: float
    spread: float
    peak: float
    distance: float
    mean: np.ndarray
    precision: np.ndarray


@dataclass(frozen=True)
class Labeller:
    """A key-point network that measures one view. Its weights hold half-precision values, so that what is saved is what measured."""

    view: View
    size_px: int
    dropout: float
    net: KeypointNet
    thresholds: Thresholds | None = None

    def __post_init__(self):
        with torch.no_grad():
            for tensor in self.net.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(tensor.half())
        self.net.eval()

    @classmethod
    def scratch(cls, view: View, choice: settings.Labeller) -> Labeller:
        """An untrained labeller; same `choice.seed`, same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(choice.seed)
            return cls(view, choice.size_px, choice.dropout, KeypointNet(len(view.points)))

    @classmethod
    def packaged(cls, view_name: str) -> Labeller:
        """The labeller schooled on phantoms that travels with this package."""
        with importlib.resources.as_file(importlib.resources.files("vhs") / "weights" / "labeller" / view_name) as folder:
            return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Labeller:
        """Opens what `save` wrote. Raises ValueError when the folder holds no labeller, or one of another shape."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} holds no labeller (a config.json): labeller.init is packaged, scratch or a labeller's folder")
        config = json.loads((folder / "config.json").read_text())
        view = VIEWS[config["view"]]
        if tuple(config["points"]) != view.points:
            raise ValueError(f"{folder} finds {', '.join(config['points'])}; {view.name} is measured on {', '.join(view.points)}")
        tensors = load_file(folder / "model.safetensors")
        arrays = {name: tensors.pop(f"thresholds.{name}").numpy() for name in ("mean", "precision") if f"thresholds.{name}" in tensors}
        net = KeypointNet(len(view.points))
        net.load_state_dict(tensors)
        thresholds = Thresholds(**config["thresholds"], **arrays) if config["thresholds"] else None
        return cls(view, config["size_px"], config["dropout"], net, thresholds)

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors; same labeller, same bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half().cpu() if value.is_floating_point() else value.cpu() for name, value in self.net.state_dict().items()}
        config = {"view": self.view.name, "points": self.view.points, "size_px": self.size_px, "dropout": self.dropout, "thresholds": None}
        if self.thresholds:
            config["thresholds"] = {name: value for name, value in asdict(self.thresholds).items() if not isinstance(value, np.ndarray)}
            tensors |= {f"thresholds.{name}": torch.from_numpy(getattr(self.thresholds, name)) for name in ("mean", "precision")}
        (folder / "model.safetensors").write_bytes(serialized(tensors))  # save_file would make it readable by its owner alone
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def to(self, device: torch.device | str) -> Labeller:
        """The same labeller, its network moved to `device`, where `measure` will run."""
        self.net.to(device)
        return self

    @torch.inference_mode()
    def measure(self, images: np.ndarray, keys: list[str], passes: int, batch: int = 64) -> Measurement:
        """Measure uint8 images [N, S, S]: one plain pass for the points, `passes` >= 1 passes with dropout masks seeded by each image's
        key.

        Batch norm is frozen in all of them, so an image's result does not depend on its neighbours (as far as floating point allows).
        """
        if images.ndim != 3 or images.shape[1] != images.shape[2] or images.dtype != np.uint8 or len(keys) != len(images) or passes < 1:
            got = f"{images.dtype} {images.shape}, {len(keys)} keys, {passes} passes"
            raise ValueError(f"measure takes uint8 [N, S, S], N keys and passes >= 1, got {got}")
        side, device = images.shape[1], next(self.net.parameters()).device
        points, draws, variances, features = [], [], [], []
        for start in range(0, len(images), batch):
            small = np.stack([_resized(image, self.size_px) for image in images[start : start + batch]])
            encoded = self.net.encode(torch.from_numpy(small).to(device)[:, None].float() / 255)
            plain, variance = self.net.decode(encoded)
            masks = np.stack([_masks_of(key, passes, self.net.channels, self.dropout) for key in keys[start : start + batch]], 1)
            draws.append(torch.stack([self.net.decode(encoded, mask)[0] for mask in torch.from_numpy(masks).to(device)], 1))
            points.append(plain), variances.append(variance), features.append(encoded[-1].mean((2, 3)))
        if not points:
            raise ValueError("no images to measure")
        plain, draws, variance, feature = [torch.cat(parts).cpu().numpy() for parts in (points, draws, variances, features)]
        plain, draws = _rescaled(plain, self.size_px, side), _rescaled(draws, self.size_px, side)
        with np.errstate(divide="ignore", invalid="ignore"):
            index, spread = self.view.measure(plain.astype(np.float64)), self.view.measure(draws.astype(np.float64)).std(1)
        return Measurement(side, plain, index, spread, np.sqrt(variance.max(1)).astype(np.float64), feature)


def _resized(image: np.ndarray, size: int) -> np.ndarray:
    if len(image) == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_LINEAR)


def _rescaled(points, size: int, to: int):
    return (points + 0.5) * (to / size) - 0.5


def _masks_of(key: str, passes: int, channels: int, dropout: float) -> np.ndarray:
    """Dropout factors [passes, C] of one image: a function of its key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    kept = np.random.default_rng(seed).random((passes, channels)) >= dropout
    return (kept / (1 - dropout)).astype(np.float32)


def plausible(measurement: Measurement, view: View) -> np.ndarray:
    """bool [N]: points inside the image, axes of some length, index and ratio of axes within the view's generous ranges."""
    points = measurement.points.astype(np.float64)
    inside = ((points >= -0.5) & (points <= measurement.side_px - 0.5)).all((1, 2))
    lengths = np.stack([np.linalg.norm(points[:, i] - points[:, j], axis=-1) for i, j in view.axes], 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = lengths[:, 0] / lengths[:, 1]
        low, high = view.axes_ratio
        shaped = (low <= ratio) & (ratio <= high) & (lengths > 0.05 * measurement.side_px).all(1)
        return inside & shaped & (view.plausible[0] <= measurement.index) & (measurement.index <= view.plausible[1])


def _distance(features: np.ndarray, mean: np.ndarray, precision: np.ndarray) -> np.ndarray:
    """Mahalanobis distance of each row (Lee et al. 2018, arXiv:1807.03888)."""
    away = features.astype(np.float64) - mean
    return np.sqrt(np.einsum("nc,cd,nd->n", away, precision.astype(np.float64), away).clip(min=0))


def fit_thresholds(measurement: Measurement, quantile: float, slack: float = 1.0) -> Thresholds:
    """Thresholds at the `quantile` of the training images' own values, times `slack`.

    A few dozen images against ~100 features: the covariance is shrunk (Ledoit & Wolf 2004), and each image's distance is taken to a
    covariance fitted without its fifth of the images, for an image lies closer to a cloud it helped to place than a new one does.
    ValueError under 10 images.
    """
    count = len(measurement.index)
    if count < 10:
        raise ValueError(f"verdict thresholds need at least 10 training images, got {count}")
    features = measurement.features.astype(np.float64)
    fold = np.arange(count) % 5
    distance = np.empty(count)
    for k in range(5):
        others = LedoitWolf().fit(features[fold != k])
        distance[fold == k] = _distance(features[fold == k], others.location_, others.precision_)
    whole = LedoitWolf().fit(features)
    limits = [slack * float(np.quantile(values, quantile)) for values in (measurement.spread, measurement.peak, distance)]
    return Thresholds(quantile, *limits, whole.location_.astype(np.float32), whole.precision_.astype(np.float32))


def verdict(measurement: Measurement, thresholds: Thresholds, view: View) -> list[tuple[bool, str]]:
    """(accepted, reason) for each image: the first that holds of "implausible geometry", "out of distribution", "spread", else ""."""
    strange = measurement.peak > thresholds.peak
    strange |= _distance(measurement.features, thresholds.mean, thresholds.precision) > thresholds.distance
    unsure = ~(measurement.spread <= thresholds.spread)  # a spread that is no number is no small one
    checks = (("implausible geometry", ~plausible(measurement, view)), ("out of distribution", strange), ("spread", unsure))
    reasons = [next((reason for reason, failed in checks if failed[n]), "") for n in range(len(measurement.index))]
    return [(not reason, reason) for reason in reasons]


def school(
    view: View, choice: settings.Labeller, draw: Callable[[int], tuple[np.ndarray, np.ndarray]], accelerator: Accelerator,
    progress: checkpoint.Progress,
) -> Labeller:  # fmt: skip
    """A labeller trained from scratch for `choice.steps` steps on images made for the purpose; one process.

    `draw(step)` gives images uint8 [b, S, S] and points float32 [b, K, 2], a pure function of the step. Peak learning rate 4e-3 suits it.
    """

    def batches(epoch: int, start: int) -> Iterator[dict]:
        for step in range(start, choice.steps):
            images, points = draw(step)
            tensors = {"image": torch.from_numpy(images)[:, None], "points": torch.from_numpy(points), "weight": torch.ones(len(images))}
            yield tensors | {"total": len(images)}

    return fine_tune(Labeller.scratch(view, choice), batches, choice, accelerator, progress, steps_per_epoch=choice.steps)


def fine_tune(
    labeller: Labeller, batches: training.Batches, choice: settings.Labeller, accelerator: Accelerator, progress: checkpoint.Progress, *,
    steps_per_epoch: int,
) -> Labeller:  # fmt: skip
    """`labeller` trained further on batches of image, points, weight, total (see training.fit), of any side. Its network is changed in
    place.

    The result has no thresholds: fit them on what it now measures.
    """

    def resized(epoch: int, start: int) -> Iterator[dict]:
        for batch in batches(epoch, start):
            side = batch["image"].shape[-1]
            images = np.stack([_resized(image, labeller.size_px) for image in batch["image"][:, 0].numpy()])
            yield batch | {"image": torch.from_numpy(images)[:, None], "points": _rescaled(batch["points"], side, labeller.size_px)}

    net = training.fit(
        labeller.net, _keypoint_loss(labeller), resized, steps=choice.steps, steps_per_epoch=steps_per_epoch,
        learning_rate=choice.learning_rate, weight_decay=choice.weight_decay, accelerator=accelerator, progress=progress,
        seed=choice.seed, augment=_vary(labeller.view),
    )  # fmt: skip
    return replace(labeller, net=net, thresholds=None)


def _keypoint_loss(labeller: Labeller) -> training.Loss:
    """Smooth L1 on the points, half of the same on the index, and a push towards narrow heat maps. Lengths as in an image of side 128."""
    view, side, unit = labeller.view, labeller.size_px, 128 / labeller.size_px
    band = view.edges[1] - view.edges[0]

    def loss(model: torch.nn.Module, batch: dict, draw: torch.Generator) -> torch.Tensor:
        target = batch["points"]
        kept = torch.rand(len(target), labeller.net.channels, generator=draw) >= labeller.dropout
        points, variance, _ = model(batch["image"], (kept / (1 - labeller.dropout)).to(target.device))
        seen = ((target > 0) & (target < side - 1)).all(-1)  # augmentation may push a point out of the picture
        away = F.smooth_l1_loss(points * unit, target * unit, reduction="none").mean(-1)
        each = ((away + 0.004 * variance * unit**2) * seen).mean(-1)
        # far from the truth an axis may have no length, and the index no gradient worth following
        near = seen.all(-1) & (away.detach().amax(-1) < 8)
        miss = (view.measure(points[near]) - view.measure(target[near])) / band
        return each.index_add(0, near.nonzero()[:, 0], F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.25, reduction="none") * 0.5)

    return loss


def _vary(view: View) -> training.Augment:
    """Strong variation: what scanners, collimation and generators do to a picture while the points still hold."""

    def augment(images: torch.Tensor, points: torch.Tensor | None, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        similar = dict(rotation_deg=view.tilt_deg, zoom=0.15, shift=0.06, flip=view.mirror)
        images, points = radiograph.augment(images, points, draw, gamma=0.35, **similar)
        return _degraded(images, draw), points

    return augment


def _degraded(images: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Blur for a third of the images (one strength a batch), coarse 8x8 blocks for a quarter, noise for all."""
    count, side, device = len(images), images.shape[-1], images.device
    chance = torch.rand(count, 3, generator=draw).to(device)[:, :, None, None, None]
    coarse = side * int(torch.randint(6, 15, (1,), generator=draw)) // 16
    blurred = F.interpolate(F.interpolate(images, size=coarse, mode="bilinear", antialias=True), size=side, mode="bilinear")
    images = torch.where(chance[:, 0] < 1 / 3, blurred, images)
    images = torch.where(chance[:, 1] < 1 / 4, _blocky(images, 0.02 + 0.1 * torch.rand(1, generator=draw).item()), images)
    noise = torch.randn(images.shape, generator=draw).to(device)
    return (images + noise * 0.04 * chance[:, 2]).clamp(0, 1)


def _blocky(images: torch.Tensor, step: float) -> torch.Tensor:
    """Cosine coefficients of 8x8 blocks rounded, the high ones coarsely: what JPEG does, and much like what a latent codec loses."""
    k = torch.arange(8, dtype=images.dtype, device=images.device)
    cosine = torch.cos(torch.pi / 8 * (k + 0.5) * k[:, None]) * torch.where(k > 0, 0.5, 0.125**0.5)[:, None]
    blocks = images.unfold(2, 8, 8).unfold(3, 8, 8)  # [B, 1, S/8, S/8, 8, 8]
    coarse = step * (1 + k + k[:, None])
    blocks = cosine.T @ (torch.round(cosine @ blocks @ cosine.T / coarse) * coarse) @ cosine
    return blocks.permute(0, 1, 2, 4, 3, 5).reshape(images.shape)

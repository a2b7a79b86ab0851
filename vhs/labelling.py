"""Images -> key points -> index. A labeller is a key-point network, the view it measures, and what was fitted on the images it learnt from: the
thresholds of its verdicts and the fingerprints of the images themselves (vhs/verdict.py).

It labels by measuring: no class is ever predicted, it follows from the index.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch.nn import functional as F

from vhs import settings
from vhs.duplicates import perceptual_hash
from vhs.measure import VIEWS, View
from vhs.networks import KeypointNet
from vhs.verdict import Copies, Measurement, Thresholds, verdict

HEAT_SHARE = 0.2  # of a heat map's width counts as its point's uncertainty: with cells of 4 px, maps are about five times as wide as the network errs
HALF_CELL_PX = 2  # an image moved by this falls into the heat maps' cells otherwise; the mean of both errs a tenth less
FITTED = {"thresholds": Thresholds, "copies": Copies}  # parts of a labeller that are fitted on training images


@dataclass(frozen=True)
class Labeller:
    """A key-point network that measures one view. Its weights hold half-precision values, so that what is saved is what measured."""

    view: View
    size_px: int
    dropout: float
    net: KeypointNet
    thresholds: Thresholds | None = None
    copies: Copies | None = None

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
        tensors, fitted = load_file(folder / "model.safetensors"), {}
        for name, kind in FITTED.items():
            own = [key for key in tensors if key.startswith(f"{name}.")]
            arrays = {key.partition(".")[2]: tensors.pop(key).numpy() for key in own}
            # JSON has lists where a dataclass has tuples
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in (config.get(name) or {}).items()}
            fitted[name] = kind(**plain, **arrays) if plain else None
        net = KeypointNet(len(view.points))
        net.load_state_dict(tensors)
        return cls(view, config["size_px"], config["dropout"], net, **fitted)

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors; same labeller, same bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.half().cpu() if value.is_floating_point() else value.cpu() for name, value in self.net.state_dict().items()}
        config = {"view": self.view.name, "points": self.view.points, "size_px": self.size_px, "dropout": self.dropout}
        for name in FITTED:
            values = asdict(getattr(self, name)) if getattr(self, name) else {}
            config[name] = {key: value for key, value in values.items() if not isinstance(value, np.ndarray)} or None
            tensors |= {f"{name}.{key}": torch.from_numpy(value) for key, value in values.items() if isinstance(value, np.ndarray)}
        (folder / "model.safetensors").write_bytes(serialized(tensors))  # save_file would make it readable by its owner alone
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    def to(self, device: torch.device | str) -> Labeller:
        """The same labeller, its network moved to `device`, where `measure` will run."""
        self.net.to(device)
        return self

    def verdict(self, measurement: Measurement) -> list[tuple[bool, str]]:
        """(accepted, reason) for each image measured, by this labeller's own thresholds and training images (vhs/verdict.py)."""
        return verdict(measurement, self.thresholds, self.view, self.copied(measurement))

    def copied(self, measurement: Measurement) -> np.ndarray:
        """bool [N]: a copy of an image this labeller learnt from."""
        return self.copies.copied(measurement) if self.copies else np.zeros(len(measurement.index), bool)

    @torch.no_grad()
    def measure(self, images: np.ndarray, keys: list[str], passes: int, batch: int = 64) -> Measurement:
        """Measure uint8 images [N, S, S]: points from the image and its mirror image, as they are and moved by half a cell, averaged; `passes` >= 1
        passes with dropout masks seeded by each image's key, on the four in turn.

        Batch norm is frozen in all of them, so an image's result does not depend on its neighbours (as far as floating point allows). The spread
        is the root of two variances added (Kendall & Gal 2017, arXiv:1703.04977): that of the passes, and that of the heat maps, carried to the
        index through its formula.
        """
        if images.ndim != 3 or images.shape[1] != images.shape[2] or images.dtype != np.uint8 or len(keys) != len(images) or passes < 1:
            got = f"{images.dtype} {images.shape}, {len(keys)} keys, {passes} passes"
            raise ValueError(f"measure takes uint8 [N, S, S], N keys and passes >= 1, got {got}")
        if not len(images):
            raise ValueError("no images to measure")
        parts = [self._measured(images[start : start + batch], keys[start : start + batch], passes) for start in range(0, len(images), batch)]
        points, draws, covariance, features = [torch.cat(part).cpu() for part in zip(*parts)]
        side = images.shape[1]
        points_px, draws_px = (rescaled(part, self.size_px, side).numpy() for part in (points, draws))
        with np.errstate(divide="ignore", invalid="ignore"):
            index, over_passes = self.view.measure(points_px.astype(np.float64)), self.view.measure(draws_px.astype(np.float64)).var(1)
            spread = np.sqrt(over_passes + index_variance(self.view, points.double(), covariance.double()).numpy())
        peak = covariance.diagonal(dim1=-2, dim2=-1).sum(-1).amax(1).sqrt().double().numpy()
        return Measurement(side, points_px, index, spread, peak, features.numpy(), tuple(map(perceptual_hash, images)))

    def _measured(self, images: np.ndarray, keys: list[str], passes: int) -> tuple[torch.Tensor, ...]:
        """Of one batch, in network pixels: points [b, K, 2], those of each pass [b, passes, K, 2], heat-map covariance [b, K, 2, 2], features [b, C]."""
        small = np.stack([resized(image, self.size_px) for image in images])
        plain = torch.from_numpy(small).to(next(self.net.parameters()).device)[:, None].float() / 255
        seen = [self.net.encode(image) for image in (plain, plain.flip(-1), _moved(plain), _moved(plain.flip(-1)))]
        masks = torch.from_numpy(np.stack([_masks_of(key, passes, self.net.channels, self.dropout) for key in keys], 1)).to(plain.device)
        found = [self._back(n, *self.net.decode(features)) for n, features in enumerate(seen)]
        draws = [self._back(n % 4, *self.net.decode(seen[n % 4], mask))[0] for n, mask in enumerate(masks)]
        points, covariance = (torch.stack(part).mean(0) for part in zip(*found))
        return points, torch.stack(draws, 1), covariance, seen[0][-1].mean((2, 3))

    def _back(self, n: int, points: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Points and covariances found in the `n`th of the four, as the image itself has them."""
        points = points - HALF_CELL_PX if n >= 2 else points
        if n % 2 == 0:
            return points, covariance
        order, turn = list(self.view.mirror), points.new_tensor([-1.0, 1.0])
        return points[:, order] * turn + points.new_tensor([self.size_px - 1.0, 0.0]), covariance[:, order] * turn * turn[:, None]


def _moved(images: torch.Tensor) -> torch.Tensor:
    """[B, 1, S, S] half a cell further right and down, the first row and column repeated."""
    side = images.shape[-1]
    return F.pad(images, (HALF_CELL_PX, 0, HALF_CELL_PX, 0), mode="replicate")[..., :side, :side]


def index_variance(view: View, points: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Variance [B] of the index of `points` [B, K, 2] whose heat maps' covariances are [B, K, 2, 2]: to first order, the points independent."""
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        (slope,) = torch.autograd.grad(view.measure(at).sum(), at)
    return HEAT_SHARE**2 * torch.einsum("bki,bkij,bkj->b", slope, covariance, slope)


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [S, S] -> uint8 [size, size]."""
    if len(image) == size:
        return image
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_LINEAR)


def rescaled(points, size: int, to: int):
    """Points of an image of side `size`, in the same image of side `to`."""
    return (points + 0.5) * (to / size) - 0.5


def _masks_of(key: str, passes: int, channels: int, dropout: float) -> np.ndarray:
    """Dropout factors [passes, C] of one image: a function of its key."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
    kept = np.random.default_rng(seed).random((passes, channels)) >= dropout
    return (kept / (1 - dropout)).astype(np.float32)

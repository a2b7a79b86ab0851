"""Schooling of a labeller: from nothing on images made for the purpose, or further on a run's own training images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from vhs import checkpoint, radiograph, settings, training
from vhs.curve import Curve
from vhs.labelling import Labeller, index_variance, rescaled, resized
from vhs.measure import View

INDEX_WEIGHT, LIKELIHOOD_WEIGHT = 4.0, 0.05  # beside the points' loss; cross-validated on the CTR training images

def school(
    view: View, choice: settings.Labeller, draw: Callable[[int], tuple[np.ndarray, np.ndarray]], accelerator: Accelerator,
    progress: checkpoint.Progress, begun: Labeller | None = None,
) -> Labeller:  # fmt: skip
    """A labeller trained from scratch, or on from `begun`, for `choice.steps` steps on images made for the purpose; one process.

    `draw(step)` gives images uint8 [b, S, S] and points float32 [b, K, 2], a pure function of the step. Peak learning rate 4e-3 suits it.
    """

    def batches(epoch: int, start: int) -> Iterator[dict]:
        for step in range(start, choice.steps):
            images, points = draw(step)
            tensors = {"image": torch.from_numpy(images)[:, None], "points": torch.from_numpy(points), "weight": torch.ones(len(images))}
            yield tensors | {"total": len(images)}

    return fine_tune(begun or Labeller.scratch(view, choice), batches, choice, accelerator, progress, steps_per_epoch=choice.steps)


def fine_tune(
    labeller: Labeller, batches: training.Batches, choice: settings.Labeller, accelerator: Accelerator, progress: checkpoint.Progress, *,
    steps_per_epoch: int, curve: Curve | None = None,
) -> Labeller:  # fmt: skip
    """`labeller` trained further on batches of image, points, weight, total (see training.fit), of any side. Its network is changed in
    place.

    The result has no thresholds and knows no copies: fit them on what it now measures. `curve` takes down the loss.
    """

    def at_size(epoch: int, start: int) -> Iterator[dict]:
        for batch in batches(epoch, start):
            side = batch["image"].shape[-1]
            images = np.stack([resized(image, labeller.size_px) for image in batch["image"][:, 0].numpy()])
            yield batch | {"image": torch.from_numpy(images)[:, None], "points": rescaled(batch["points"], side, labeller.size_px)}

    net = training.fit(
        labeller.net, _keypoint_loss(labeller), at_size, steps=choice.steps, steps_per_epoch=steps_per_epoch,
        learning_rate=choice.learning_rate, weight_decay=choice.weight_decay, accelerator=accelerator, progress=progress,
        seed=choice.seed, augment=_vary(labeller.view), curve=curve,
    )  # fmt: skip
    return replace(labeller, net=net, thresholds=None, copies=None)


def _keypoint_loss(labeller: Labeller) -> training.Loss:
    """Smooth L1 on the points, some on the index, a push towards narrow heat maps, and a Gaussian likelihood of the index.

    The likelihood's variance is what the heat maps carry to the index, its error is taken as it is: it teaches the heat maps to be as wide as the
    network errs, and so the spread to rank errors (Nix & Weigend 1994; Kendall & Gal 2017), without moving a point. Lengths as in an image of
    side 128, the index in widths of the normal class.
    """
    view, side, unit = labeller.view, labeller.size_px, 128 / labeller.size_px
    band = view.edges[1] - view.edges[0]

    def loss(model: torch.nn.Module, batch: dict, draw: torch.Generator) -> torch.Tensor:
        target = batch["points"]
        kept = torch.rand(len(target), labeller.net.channels, generator=draw) >= labeller.dropout
        points, covariance = model(batch["image"], (kept / (1 - labeller.dropout)).to(target.device))
        seen = ((target > 0) & (target < side - 1)).all(-1)  # augmentation may push a point out of the picture
        away = F.smooth_l1_loss(points * unit, target * unit, reduction="none").mean(-1)
        each = ((away + 0.004 * covariance.diagonal(dim1=-2, dim2=-1).sum(-1) * unit**2) * seen).mean(-1)
        # far from the truth an axis may have no length, and the index no gradient worth following
        near = seen.all(-1) & (away.detach().amax(-1) < 8)
        miss = (view.measure(points[near]) - view.measure(target[near])) / band
        variance = index_variance(view, points[near], covariance[near]) / band**2 + 1e-4
        index = INDEX_WEIGHT * F.smooth_l1_loss(miss, torch.zeros_like(miss), beta=0.25, reduction="none")
        index = index + LIKELIHOOD_WEIGHT * (miss.detach() ** 2 / variance + variance.log())
        return each.index_add(0, near.nonzero()[:, 0], index)

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

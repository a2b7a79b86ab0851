"""A classifier's augmentation: an image's index stays what it was, and every image's draws are its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2

from vhs import augmentation
from vhs.settings import Classifier

SIDE = 96
ALL = augmentation.GreyRandAugment


class Sheared(ALL):
    """What must not happen: the same with the operations that were taken out put back."""

    _AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name] for name in ("ShearX", "ShearY")}


def spots(points: np.ndarray) -> torch.Tensor:
    """One image a point, a soft bright spot on grey: [K, 1, S, S]."""
    x = torch.arange(SIDE, dtype=torch.float32)
    gaps = torch.stack([(x[None, :] - px) ** 2 + (x[:, None] - py) ** 2 for px, py in points.tolist()])
    return (0.2 + 0.6 * torch.exp(-gaps / 18))[:, None]


def found(image: torch.Tensor) -> np.ndarray:
    """Where the spot is: the centre of what is clearly brighter than its surroundings."""
    weight = (image[0] - image.median() - 0.5 * (image.max() - image.median())).clamp(min=0)
    x = torch.arange(SIDE, dtype=torch.float32)
    return np.array([(weight.sum(0) * x).sum() / weight.sum(), (weight.sum(1) * x).sum() / weight.sum()])


def distances(points: np.ndarray) -> np.ndarray:
    return np.linalg.norm(points[:, None] - points[None], axis=-1)[np.triu_indices(len(points), 1)]


def bend(kind, seed: int) -> float:
    """By how much `kind` changes the proportions of four points: the spread of (distance after / distance before), 0 for a similarity."""
    points = SIDE / 2 + np.array([[-20, -4], [18, 8], [4, -22], [-6, 17]], np.float32)
    augment = kind(magnitude=9, ops=2)
    # the same draws for each spot: its image is alone in its batch
    moved = [found(augment.images(spot[None], torch.Generator().manual_seed(seed))[0]) for spot in spots(points)]
    ratio = distances(np.array(moved)) / distances(points)
    return float(ratio.max() / ratio.min() - 1)


@given(st.integers(0, 2**40))
@settings(deadline=None, max_examples=40)
def test_randaugment_keeps_every_proportion(seed):
    assert bend(ALL, seed) < 0.03


def test_the_measure_above_sees_a_shear():
    assert max(bend(Sheared, seed) for seed in range(8)) > 0.1


def test_only_operations_that_make_sense_on_grey_are_left():
    assert set(ALL._AUGMENTATION_SPACE) == {"Rotate", "Brightness", "Contrast", "Sharpness", "AutoContrast", "Equalize"}


def test_magnitude_nine_is_timms():
    """timm's m9 of 10, as the study had it: 27 degrees, enhancement by a factor of 1 +- 0.81."""
    for name, value in (("Rotate", 27.0), ("Brightness", 0.81), ("Contrast", 0.81), ("Sharpness", 0.81)):
        magnitudes, signed = ALL._AUGMENTATION_SPACE[name]
        augment = ALL(magnitude=9, ops=2)
        assert signed and float(magnitudes(augment.num_magnitude_bins, SIDE, SIDE)[augment.magnitude]) == pytest.approx(value)


def test_every_image_has_draws_of_its_own_that_follow_the_generator():
    image = spots(np.array([[30.0, 40.0]]))
    augment = augmentation.for_classifier(Classifier(randaugment=9), ())
    batch = image.expand(12, -1, -1, -1)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one, two, other = (augment(batch, None, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(torch.rand(2), expected), "the process's own generator moved"
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len({each.numpy().tobytes() for each in one}) == 12
    assert one.min() >= 0 and one.max() <= 1 and one.shape == batch.shape


def test_an_images_draws_do_not_depend_on_the_others():
    augment, image = ALL(magnitude=9, ops=2), spots(np.array([[30.0, 40.0]]))
    company = torch.cat([torch.rand(1, 1, SIDE, SIDE), image])
    a, b = (augment.images(torch.cat([first, image]), torch.Generator().manual_seed(3))[1] for first in (company[:1], image))
    assert torch.equal(a, b)


def test_randaugment_refuses_points_it_would_leave_behind():
    augment = augmentation.for_classifier(Classifier(randaugment=9), ())
    with pytest.raises(ValueError, match="leaves their points behind"):
        augment(torch.rand(1, 1, SIDE, SIDE), torch.zeros(1, 6, 2), torch.Generator())

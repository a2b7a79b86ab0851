"""What a classifier's training images go through: a similarity, a gamma, and what RandAugment leaves for grey radiographs.

The label of an image is its heart-size index cut at two edges, so nothing here may scale one direction and not the other.
"""

from __future__ import annotations

import functools

import torch
from torchvision.transforms import v2

from vhs import radiograph, settings
from vhs.training import Augment


class GreyRandAugment(v2.RandAugment):
    """RandAugment (Cubuk et al. 2020, arXiv:1909.13719) with the operations that leave a radiograph a radiograph, magnitudes 0 to 10.

    Kept: Rotate, Brightness, Contrast, Sharpness, AutoContrast, Equalize. Left out: ShearX and ShearY, which change the index; Color, which
    does nothing to grey; Posterize, Solarize and Invert, which put bone among the dark tones, where no film has it; TranslateX and
    TranslateY, which at magnitude 9 push the heart out of the picture (classifier.shift moves it a little; the study left them out too).
    As in timm's `rand-m9`, which the study used, an operation drawn is applied with probability 1/2; its random magnitudes (`mstd0.5`)
    are not followed.
    """

    _AUGMENTATION_SPACE = {
        name: v2.RandAugment._AUGMENTATION_SPACE[name]
        for name in ("Rotate", "Brightness", "Contrast", "Sharpness", "AutoContrast", "Equalize")
    }

    def __init__(self, magnitude: int, ops: int):
        super().__init__(num_ops=1, magnitude=magnitude, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR)
        self.ops = ops

    def images(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """images [B, 1, S, S] in 0..1 -> the same, each with operations of its own: a function of `generator` and its place."""
        seeds = torch.randint(2**62, (len(images),), generator=generator).tolist()
        done = []
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            for image, seed in zip(images, seeds, strict=True):
                torch.default_generator.manual_seed(seed)
                for taken in (torch.rand(self.ops) < 0.5).tolist():
                    image = self(image) if taken else image
                done.append(image)
        return torch.stack(done)


def for_classifier(choice: settings.Classifier, mirror: tuple[int, ...]) -> Augment:
    """The augmentation that `choice` asks for; `mirror` is the view's (View.mirror). With randaugment on it takes images without points."""
    similar = functools.partial(
        radiograph.augment,
        rotation_deg=choice.rotation_deg,
        zoom=choice.zoom,
        shift=choice.shift,
        flip=mirror if choice.flip else None,
        gamma=choice.gamma,
    )
    if not choice.randaugment:
        return similar
    further = GreyRandAugment(choice.randaugment, choice.randaugment_ops)

    def augment(images, points, generator):
        if points is not None:
            raise ValueError("RandAugment turns images and leaves their points behind: set classifier.randaugment to 0")
        return further.images(similar(images, None, generator)[0], generator), None

    return augment

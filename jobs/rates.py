"""What the planner is told of models and machines: stated figures, none of them measured on this machine. `vhs run --dry-run` marks them so.

Operations are counted with torch.utils.flop_counter (a multiply-add is two), for one image at the side given; activations are rough, for training
in float32. Classifiers without the study's deep head.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """`parameters_m` in millions, `gflop` of one forward pass of one image of side `side_px`, `activations_gb` a training keeps for it."""

    parameters_m: float
    gflop: float
    activations_gb: float
    side_px: int
    thin: bool = False  # depthwise or narrow: bound by memory, far below what a device can compute

    def at(self, side_px: int) -> float:
        """Operations and activations grow with the image's area: the factor."""
        return (side_px / self.side_px) ** 2


@dataclass(frozen=True)
class Diffusion:
    """The UNet, and what codec and text encoder add: decoding and encoding one image, their parameters."""

    unet: Network
    decode_gflop: float
    encode_gflop: float
    rest_m: float


DIFFUSION = {  # by the UNet's block_out_channels
    (320, 640, 1280, 1280): Diffusion(Network(860, 678, 3.0, 512), 2480, 1080, 207),  # Stable Diffusion 1.x and, within a few percent, 2.x
    (48, 96, 176): Diffusion(Network(8.1, 0.54, 0.03, 128), 1.94, 0.58, 1.3),  # vhs/weights/base
}
CLASSIFIERS = {  # timm's names
    "tf_efficientnet_b7": Network(63.8, 75.3, 3.5, 600, thin=True),
    "tf_efficientnet_b4": Network(17.6, 8.7, 0.9, 380, thin=True),
    "tf_efficientnet_b2": Network(7.7, 2.2, 0.35, 288, thin=True),
    "tf_efficientnet_b0": Network(4.0, 0.75, 0.12, 224, thin=True),
    "tf_efficientnet_lite0": Network(3.4, 0.75, 0.10, 224, thin=True),
    "resnet10t": Network(4.9, 2.2, 0.04, 224),
    "resnet18": Network(11.2, 3.5, 0.06, 224),
    "resnet50": Network(23.5, 8.0, 0.20, 224),
    "vit_tiny_patch16_224": Network(5.4, 2.5, 0.06, 224),
    "vit_small_patch16_224": Network(21.5, 9.1, 0.12, 224),
}
KEYPOINTS = Network(0.23, 0.107, 0.012, 128, thin=True)


@dataclass(frozen=True)
class Machine:
    """What a device sustains, in operations a second, and what an image or a unit costs beside."""

    name: str
    diffusion_gflops: float
    dense_gflops: float
    thin_gflops: float
    image_s: float  # read, decode, augment
    unit_s: float  # open models

    @property
    def plural(self) -> str:
        return "GPUs" if self is GPU else "cores"

    def gflops(self, network: Network) -> float:
        return self.thin_gflops if network.thin else self.dense_gflops


CORE = Machine("one CPU core", 50, 50, 12, 0.004, 1.5)
# an RTX 3090, half precision: tf_efficientnet_b7 at 600 px trains 31-37 images/s there (timm's users), Stable Diffusion 1.5 draws about one image
# a second and a half at 20 guided steps
GPU = Machine("one 24 GB GPU", 18_000, 15_000, 7_500, 0.005, 15)
GPU_GB = 24

INGEST_S = 0.05  # an image, of decoding, letterboxing and encoding
PNG_BYTES_PER_PIXEL = 0.5  # a grey radiograph, 8 bits
PROCESS_GB = 1.2  # torch, diffusers, transformers loaded
ACCEPTED = 0.7  # of what is generated
DISCORDANCE = 0.25  # share of test images on which two arms disagree

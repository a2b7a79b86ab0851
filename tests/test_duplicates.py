"""The perceptual hash tells two patients apart and one image, saved twice, together."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from vhs.duplicates import alike, clusters, distances, perceptual_hash
from vhs.phantom import draw_many
from vhs.radiograph import Letterbox, decode
from vhs.settings import Split

BITS = Split().duplicate_bits


def stored(image: np.ndarray, size: int = 128) -> str:
    return perceptual_hash(Letterbox(*image.shape[::-1], size).image(image))


def again(image: np.ndarray) -> dict[str, np.ndarray]:
    """The image as copies of data sets hold it."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=60)
    return {
        "jpeg": decode(file.getvalue()),
        "smaller": cv2.resize(image, None, fx=0.6, fy=0.6, interpolation=cv2.INTER_AREA),
        "larger": cv2.resize(image, None, fx=1.7, fy=1.7),
        "gamma": (255 * (image / 255) ** 0.8).astype(np.uint8),
        "noise": np.clip(image + np.random.default_rng(0).normal(0, 4, image.shape), 0, 255).astype(np.uint8),
    }


def measured(images: list[np.ndarray]) -> tuple[int, int]:
    """-> (bits between the nearest two of the images, bits between an image and the farthest of its copies)."""
    hashes = [stored(image) for image in images]
    apart = distances(hashes, hashes)
    farthest = max(distances([own], [stored(copy)])[0, 0] for own, image in zip(hashes[::8], images[::8], strict=True) for copy in again(image).values())
    return int(apart[np.triu_indices(len(images), 1)].min()), int(farthest)


def test_on_real_chest_films(real_data, figure):
    files = sorted((real_data / "ctr" / "images").iterdir())
    nearest, farthest = measured([decode(file.read_bytes()) for file in files])
    figure(f"{len(files)} people: the nearest two are {nearest} bits apart, an image and its copies at most {farthest}, joined up to {BITS}")
    assert farthest <= BITS < nearest


def test_on_drawn_dogs():
    images, _ = draw_many("canine_lateral", "clinic", range(200), size_px=96)
    nearest, farthest = measured(list(images))
    assert farthest <= BITS < nearest


def test_distances_and_clusters():
    hashes = ["00" * 32, "01" + "00" * 31, "ff" * 32, "03" + "00" * 31]
    assert distances(hashes[:1], hashes).tolist() == [[0, 1, 256, 2]]
    assert clusters(alike(hashes, 1)).tolist() == [0, 0, 1, 0], "a chain is one cluster"
    assert clusters(alike([], 1)).size == 0


def test_many_films_are_compared_in_little_memory(peak):
    """Over several blocks the same as all at once, and 3,000 films in a fifth of what all at once take."""
    bits = np.random.default_rng(0).integers(0, 256, (3000, 32), dtype=np.uint8)
    bits[2900] = bits[7]
    hashes = [row.tobytes().hex() for row in bits]
    most = peak()
    near = alike(hashes, BITS)
    assert most() < 0.2 * 3000 * 3000 * 40
    assert sorted(zip(*(part.tolist() for part in near.nonzero()))) == sorted([*((i, i) for i in range(3000)), (7, 2900), (2900, 7)])
    one, other = np.unpackbits(bits[:600], axis=1), np.unpackbits(bits[-3:], axis=1)
    assert np.array_equal(distances(hashes[:600], hashes[-3:]), (one[:, None] != other[None]).sum(-1))


@pytest.mark.parametrize("grey", [0, 200])
def test_an_empty_image_has_a_hash_too(grey):
    assert len(perceptual_hash(np.full((64, 64), grey, np.uint8))) == 64

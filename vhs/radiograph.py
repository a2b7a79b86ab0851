"""One radiograph from a file's bytes to a square grey image, and back: decode, letterbox, encode, augment.

Grey uint8 everywhere. Heart-size indices compare lengths along different directions, so nothing here scales x and y differently.
Points are [..., K, 2], x right, y down, pixel centres at integers.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pydicom
import pydicom.encaps
import pydicom.filereader
import pydicom.pixels
from PIL import Image, ImageOps, TiffImagePlugin
from pydicom.uid import DeflatedExplicitVRLittleEndian

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 100_000_000  # declared, before anything is unpacked; the largest flat-panel detectors give 20 million
JP2 = b"\0\0\0\x0cjP  "  # how a JPEG 2000 file begins, and its codestream alone does not
TAILS = (0.5, 99.5)  # percentiles that become black and white where a file has more than 8 bits and no window of its own


class Unreadable(ValueError):
    """This file is no radiograph we can use; the message is the reason."""


def film(data: bytes, name: str = "") -> tuple[np.ndarray, Header]:
    """A file's image and header, as `decode` and `read_header` have them: one call for a process that may die of it."""
    return decode(data, name), read_header(data, name)


def decode(data: bytes, name: str = "") -> np.ndarray:
    """PNG, JPEG, TIFF or DICOM bytes -> uint8 [H, W], black is air. `name` only serves messages and files without a DICOM preamble.

    DICOM: modality and VOI transforms applied, MONOCHROME1 inverted. Images of more than 8 bits without a window are stretched between
    TAILS. Colour, palette and alpha fold into grey. Raises Unreadable with the reason.
    """
    label = name or "image"
    if not data:
        raise Unreadable(f"{label}: empty file")
    dicom = _is_dicom(data, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom's quote what the header says
            return _decode_dicom(data) if dicom else _decode_picture(data)
    except Unreadable as error:
        raise Unreadable(f"{label}: {error}") from None
    except Exception as error:  # the decoders raise OSError, SyntaxError, struct.error, KeyError ... for damaged bytes
        kind = error.__class__.__name__
        what = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # where an object lay differs each time, and a reject's reason is among a run's bytes
        said = f"damaged DICOM ({kind})" if dicom else f"damaged or not PNG, JPEG, TIFF or DICOM ({kind}: {what})"
        raise Unreadable(f"{label}: {said}") from None  # of a DICOM, whose error may quote a patient's name, not even as the cause


@dataclass(frozen=True)
class Header:
    """What is kept of a DICOM header, and all that is: no name, date or number of a patient is ever read.

    pixel_spacing_mm: in the patient (PixelSpacing, not the detector's ImagerPixelSpacing). burned_in: BurnedInAnnotation is YES, so the pixels
    may show who it is.
    """

    pixel_spacing_mm: float | None = None
    burned_in: bool = False


def read_header(data: bytes, name: str = "") -> Header:
    """The header of a file that `decode` takes; empty for other files than DICOM."""
    if not _is_dicom(data, name):
        return Header()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = _open_dicom(data, stop_before_pixels=True, specific_tags=["PixelSpacing", "BurnedInAnnotation"])
        spacing = dataset.get("PixelSpacing")
    return Header(float(spacing[0]) if spacing else None, str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES")


def _is_dicom(data: bytes, name: str) -> bool:
    return data[128:132] == b"DICM" or name.lower().endswith((".dcm", ".dicom"))


def _refuse_bomb(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise Unreadable(f"declares {width} x {height} pixels, legal are 1 to {MAX_PIXELS:,}")


def _decode_picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as picture:
        _refuse_bomb(*picture.size)
        picture.load()
        turned = ImageOps.exif_transpose(picture)
        if not turned.mode.startswith(("I", "F")):
            return np.asarray(turned.convert("L"))
        # Pillow swaps WhiteIsZero for up to 8 bits only
        inverted = picture.format == "TIFF" and picture.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        return _stretch(np.asarray(turned), inverted=inverted)


def _decode_dicom(data: bytes) -> np.ndarray:
    dataset = _open_dicom(data)
    if "PixelData" not in dataset:
        raise Unreadable("a DICOM file without an image")
    deep = int(dataset.get("NumberOfFrames") or 1) * int(dataset.get("SamplesPerPixel") or 1)
    _refuse_bomb(int(dataset.Columns), int(dataset.Rows) * deep)
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise Unreadable(f"holds {dataset.NumberOfFrames} frames, a radiograph is one: export the frame wanted")
    spacing = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or dataset.get("PixelAspectRatio") or (1, 1)
    if abs(float(spacing[0]) / float(spacing[1]) - 1) > 0.01:
        raise Unreadable(f"pixels are not square (spacing {spacing[0]} x {spacing[1]}): resample it, an index compares directions")
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and not pydicom.pixels.get_decoder(syntax).is_available:
        raise Unreadable(f"is compressed as {syntax.name}: pip install pylibjpeg pylibjpeg-libjpeg, or export it uncompressed")
    if syntax.is_encapsulated:
        _refuse_endless(pydicom.encaps.get_frame(dataset.PixelData, 0, number_of_frames=1))
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, dataset)
        pixels = (pixels >> 8 if pixels.dtype == np.uint16 else pixels).astype(np.uint8)
    if pixels.ndim == 3:
        return np.asarray(Image.fromarray(pixels).convert("L"))
    values = pydicom.pixels.apply_modality_lut(pixels, dataset)
    windowed = "VOILUTSequence" in dataset or ("WindowCenter" in dataset and "WindowWidth" in dataset)
    if windowed:
        values = pydicom.pixels.apply_voi_lut(values, dataset)
    return _stretch(values, tails=(0, 100) if windowed else TAILS, inverted=dataset.PhotometricInterpretation == "MONOCHROME1")


def _refuse_endless(frame: bytes) -> None:
    """pydicom goes through the boxes of a JP2 file by their lengths, and for ever where one has none."""
    at = len(JP2) + 4
    while frame.startswith(JP2) and at < len(frame) and frame[at + 4 : at + 8] != b"jp2c":
        if not (length := int.from_bytes(frame[at : at + 4], "big")):
            raise Unreadable("damaged DICOM (a box of its JPEG 2000 image has no length)")
        at += length


def _open_dicom(data: bytes, **options) -> pydicom.Dataset:
    """The data set, unless all of it is deflated, which pydicom would inflate to whatever size, before anything is known of it."""
    with_preamble = data[128:132] == b"DICM"
    stream = io.BytesIO(data)
    stream.seek(132 if with_preamble else 0)
    about = pydicom.filereader.read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    if about.get("TransferSyntaxUID") == DeflatedExplicitVRLittleEndian:
        raise Unreadable("is deflated as a whole: export it uncompressed, or with a compressed image")
    return pydicom.dcmread(io.BytesIO(data), force=not with_preamble, **options)


def _stretch(values: np.ndarray, tails: tuple[float, float] = TAILS, inverted: bool = False) -> np.ndarray:
    values = np.asarray(values, np.float32)
    if not np.isfinite(values).all():
        raise Unreadable("holds pixels that are not numbers")
    low, high = np.percentile(values, tails)
    if low == high:
        raise Unreadable(f"holds a single grey level ({low:g})")
    grey = np.clip((values - low) / (high - low), 0, 1)
    return np.rint(255 * (1 - grey if inverted else grey)).astype(np.uint8)


@dataclass(frozen=True)
class Letterbox:
    """Fits width x height into size x size: black bars to a centred square, then one resize, so the scale is one number for x and y."""

    width: int
    height: int
    size: int

    @property
    def scale(self) -> float:
        """Output pixels per original pixel."""
        return self.size / max(self.width, self.height)

    @property
    def _bars(self) -> tuple[int, int]:
        side = max(self.width, self.height)
        return (side - self.width) // 2, (side - self.height) // 2

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [height, width] -> uint8 [size, size]. Averages when shrinking (no aliasing), linear when enlarging."""
        if image.shape != (self.height, self.width):
            raise ValueError(f"this letterbox takes images of {self.height} x {self.width} pixels (height x width), got {image.shape}")
        side, (left, top) = max(self.width, self.height), self._bars
        square = np.zeros((side, side), image.dtype)
        square[top : top + self.height, left : left + self.width] = image
        return cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_AREA if self.size < side else cv2.INTER_LINEAR)

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Original pixels -> letterboxed pixels. A pixel is a unit square around its integer centre, hence the halves."""
        return (np.asarray(points) + np.array(self._bars) + 0.5) * self.scale - 0.5

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Letterboxed pixels -> original pixels."""
        return (np.asarray(points) + 0.5) / self.scale - 0.5 - np.array(self._bars)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W] -> an 8-bit grey PNG; the same image gives the same bytes."""
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"encode_png takes grey uint8 [H, W], got {image.dtype} {image.shape}")
    return cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_UP])[1].tobytes()


def decode_png(data: bytes) -> np.ndarray:
    """What `encode_png` wrote -> uint8 [H, W]. For our own shards; foreign files go through `decode`."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data else None
    if image is None or image.ndim != 2 or image.dtype != np.uint8:
        raise Unreadable("not an 8-bit grey PNG of this project")
    return image


def augment(
    images: torch.Tensor, points: torch.Tensor | None, generator: torch.Generator, *,
    rotation_deg: float = 0.0, zoom: float = 0.0, shift: float = 0.0, flip: tuple[int, ...] | None = None, gamma: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """A random similarity and a random gamma for each image; points go along. No shear, no anisotropic scale: the index stays what it was.

    images [B, 1, S, S] in 0..1, points [B, K, 2] px. Rotation within +-rotation_deg, scale within [1 / (1 + zoom), 1 + zoom], shift within
    +-shift of the side; `flip` gives the order of the points in a mirror image (View.mirror) and mirrors half of the images, None mirrors
    none; exponent within [1 - gamma, 1 / (1 - gamma)]. All draws come from `generator` (on the CPU), so the result does not depend on the
    device's generator.
    """
    import torch
    from torch.nn import functional as F

    count, side = len(images), images.shape[-1]
    draw = torch.rand(count, 6, generator=generator).to(images.device) * 2 - 1
    angle, scale = torch.deg2rad(draw[:, 0] * rotation_deg), (1 + zoom) ** draw[:, 1]
    mirrored = (draw[:, 4] < 0) if flip is not None else torch.zeros_like(draw[:, 4], dtype=torch.bool)
    cos, sin, sign = angle.cos() * scale, angle.sin() * scale, torch.where(mirrored, -1.0, 1.0)
    turn = torch.stack([torch.stack([cos * sign, -sin], -1), torch.stack([sin * sign, cos], -1)], -2)  # [B, 2, 2], the mirror acts first
    move = draw[:, 2:4] * shift * 2  # in units where the image spans -1..1

    back = torch.linalg.inv(turn)
    grid = F.affine_grid(torch.cat([back, -(back @ move[..., None])], -1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="zeros", align_corners=False)
    if gamma:
        images = images.clamp(0, 1) ** ((1 - gamma) ** draw[:, 5])[:, None, None, None]
    if points is None:
        return images, None
    centred = (points + 0.5) * (2 / side) - 1
    points = (torch.einsum("bij,bkj->bki", turn, centred) + move[:, None] + 1) * (side / 2) - 0.5
    if flip is not None:
        points = torch.where(mirrored[:, None, None], points[:, list(flip)], points)
    return images, points

"""Radiographs: what comes out of real and broken files, and that no step bends the geometry."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, JPEGLosslessSV1, generate_uid

from vhs import radiograph
from vhs.measure import VIEWS

DATA = Path(os.environ.get("VHS_TEST_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real radiographs at {DATA}: set VHS_TEST_DATA")

greys = arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)))


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def dicom(pixels: np.ndarray, **tags) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *pixels.shape[-2:], 1
    dataset.PhotometricInterpretation, dataset.PixelRepresentation = "MONOCHROME2", 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelData = pixels.astype(np.uint16).tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    return file.getvalue()


@given(greys)
@settings(deadline=None, max_examples=30)
def test_png_round_trip_is_exact_and_repeats_its_bytes(image):
    data = radiograph.encode_png(image)
    assert data == radiograph.encode_png(image.copy())
    assert np.array_equal(radiograph.decode_png(data), image) and np.array_equal(radiograph.decode(data), image)


@given(greys, st.sampled_from(["L", "RGB", "RGBA", "P", "LA", "TIFF"]))
@settings(deadline=None, max_examples=60)
def test_grey_stored_in_another_mode_is_the_same_grey(image, mode):
    picture = Image.fromarray(image)
    data = saved(picture, "TIFF") if mode == "TIFF" else saved(picture.convert(mode))
    assert np.array_equal(radiograph.decode(data, "any.file"), image)


def test_sixteen_bits_are_stretched_and_white_is_zero_is_turned():
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(np.uint16)
    grey = radiograph.decode(saved(Image.fromarray(ramp)))
    assert grey[0, 0] == 0 and grey[-1, -1] == 255 and abs(int(grey[32, 0]) - 128) <= 2
    turned = radiograph.decode(saved(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0}))
    assert np.abs(turned.astype(int) - (255 - grey)).max() <= 1


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone stores a picture held upright
    assert radiograph.decode(saved(Image.new("L", (40, 20)), "JPEG", exif=exif)).shape == (40, 20)


def test_dicom_window_slope_and_photometric_interpretation():
    ramp = np.arange(4096).reshape(64, 64)
    full = radiograph.decode(dicom(ramp))
    assert full[0, 0] == 0 and full[-1, -1] == 255
    window = radiograph.decode(dicom(ramp, WindowCenter=1000, WindowWidth=200)).ravel()
    assert window[800] == 0 and window[1200] == 255 and abs(int(window[1000]) - 128) <= 2
    rescaled = radiograph.decode(dicom(ramp, WindowCenter=0, WindowWidth=200, RescaleSlope=1, RescaleIntercept=-1000)).ravel()
    assert np.array_equal(rescaled, window)
    inverted = radiograph.decode(dicom(ramp, WindowCenter=1000, WindowWidth=200, PhotometricInterpretation="MONOCHROME1")).ravel()
    assert np.abs(inverted.astype(int) + window - 255).max() <= 1


def test_a_dicom_palette_is_looked_up():
    ramp = np.arange(4096).reshape(64, 64) % 256
    table = (np.arange(256)[::-1] * 257).astype("<u2").tobytes()  # entry i is the grey 255 - i
    parts = {"Descriptor": [256, 0, 16], "Data": table}
    palette = {f"{colour}PaletteColorLookupTable{part}": value for colour in ("Red", "Green", "Blue") for part, value in parts.items()}
    assert np.array_equal(radiograph.decode(dicom(ramp, PhotometricInterpretation="PALETTE COLOR", **palette)), 255 - ramp)


def test_of_a_dicom_header_only_what_is_no_ones_identity_is_kept():
    ramp = np.arange(4096).reshape(64, 64)
    tags = {"PatientName": "Doe^Rex", "PatientID": "4711", "PixelSpacing": [0.139, 0.139]}
    header = radiograph.read_header(dicom(ramp, **tags))
    assert header == radiograph.Header(0.139, False) and set(vars(header)) == {"pixel_spacing_mm", "burned_in"}
    assert radiograph.read_header(dicom(ramp, BurnedInAnnotation="YES")) == radiograph.Header(None, True)
    assert radiograph.read_header(dicom(ramp, BurnedInAnnotation="NO", ImagerPixelSpacing=[0.1, 0.1])) == radiograph.Header()
    assert radiograph.read_header(saved(Image.fromarray(ramp.astype(np.uint8)))) == radiograph.Header()


@pytest.mark.parametrize(
    "tags, reason",
    [
        ({"Rows": 20000, "Columns": 20000}, "20000 x 20000"),
        ({"NumberOfFrames": 2}, "frames"),
        ({"PixelSpacing": [0.1, 0.2]}, "not square"),
        ({"PixelData": b"\0" * 40}, "damaged"),
    ],
)
def test_unusable_dicom_says_why(tags, reason):
    with pytest.raises(radiograph.Unreadable, match=f"scan.dcm: .*{reason}"):
        radiograph.decode(dicom(np.arange(4096).reshape(64, 64), **tags), "scan.dcm")


def test_a_codec_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(pydicom.pixels.get_decoder(JPEGLosslessSV1), "_available", {})
    dataset = pydicom.dcmread(io.BytesIO(dicom(np.arange(4096).reshape(64, 64))))
    dataset.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    dataset.PixelData = encapsulate([b"\0" * 100])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(file := io.BytesIO(), enforce_file_format=True)
    with pytest.raises(radiograph.Unreadable, match="JPEG Lossless.*pip install pylibjpeg"):
        radiograph.decode(file.getvalue())


def test_a_bomb_is_refused_before_it_is_unpacked():
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    body = b"IDAT" + zlib.compress(b"\0")
    data = b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    with pytest.raises(radiograph.Unreadable, match="20000 x 20000|400000000"):
        radiograph.decode(data, "bomb.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_truncated_files_are_unreadable(kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    data = saved(Image.fromarray(noise), kind)
    with pytest.raises(radiograph.Unreadable, match="cut.img: "):
        radiograph.decode(data[: int(len(data) * share)], "cut.img")


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=60)
def test_any_bytes_decode_or_are_unreadable(data):
    for name in ("", "x.dcm"):
        try:
            assert radiograph.decode(data, name).dtype == np.uint8
        except radiograph.Unreadable:
            pass


sides = st.integers(1, 3000)


@given(sides, sides, st.integers(16, 600), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_letterbox_goes_there_and_back_and_keeps_every_ratio(width, height, size, seed):
    box = radiograph.Letterbox(width, height, size)
    points = np.random.default_rng(seed).uniform(-0.5, [width - 0.5, height - 0.5], (6, 2))
    there = box.forward(points)
    assert np.allclose(box.inverse(there), points, atol=1e-6)
    assert (there >= -0.5 - 1e-6).all() and (there <= size - 0.5 + 1e-6).all()
    lengths, boxed = [np.linalg.norm(p[:, None] - p, axis=-1) for p in (points, there)]
    assert np.allclose(boxed, lengths * box.scale, rtol=1e-6, atol=1e-6)


@given(st.integers(20, 90), st.integers(20, 90), st.integers(32, 200), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_letterboxed_pixels_land_where_their_points_land(width, height, size, seed):
    x, y = np.random.default_rng(seed).integers(6, [width - 6, height - 6])
    image = np.zeros((height, width), np.uint8)
    image[y - 3 : y + 4, x - 3 : x + 4] = 200
    box = radiograph.Letterbox(width, height, size)
    boxed = box.image(image).astype(float)
    rows, columns = np.mgrid[:size, :size]
    centre = np.array([(boxed * columns).sum(), (boxed * rows).sum()]) / boxed.sum()
    assert np.abs(centre - box.forward([x, y])).max() < 0.1


def discs(side: int, points: np.ndarray) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return np.exp(-((columns - points[:, 0, None, None]) ** 2 + (rows - points[:, 1, None, None]) ** 2) / 8).astype(np.float32)


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_augmented_points_follow_the_augmented_pixels(seed):
    points = np.random.default_rng(seed).uniform(22, 42, (8, 1, 2)).astype(np.float32)
    images, moved = radiograph.augment(
        torch.from_numpy(discs(64, points[:, 0]))[:, None], torch.from_numpy(points), torch.Generator().manual_seed(seed),
        rotation_deg=30, zoom=0.2, shift=0.1, flip=(0,),
    )  # fmt: skip
    weight = images[:, 0].numpy()
    rows, columns = np.mgrid[:64, :64]
    centre = np.stack([(weight * columns).sum((1, 2)), (weight * rows).sum((1, 2))], 1) / weight.sum((1, 2))[:, None]
    assert np.abs(centre - moved[:, 0].numpy()).max() < 0.15


@given(st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=25)
def test_augmentation_leaves_the_vertebral_heart_size_alone(seed):
    view = VIEWS["canine_lateral"]
    points = torch.from_numpy(np.random.default_rng(seed).uniform(10, 118, (5, 6, 2)).astype(np.float32))
    strong = dict(rotation_deg=45, zoom=0.4, shift=0.4, flip=view.mirror, gamma=0.3)
    _, moved = radiograph.augment(torch.zeros(5, 1, 128, 128), points, torch.Generator().manual_seed(seed), **strong)
    assert torch.allclose(view.measure(moved), view.measure(points), rtol=1e-3)


def test_a_mirror_swaps_left_and_right_names():
    view, points = VIEWS["human_frontal"], torch.tensor([[[30.0, 60], [70, 60], [10, 80], [110, 80]]]).repeat(32, 1, 1)
    _, moved = radiograph.augment(torch.zeros(32, 1, 128, 128), points, torch.Generator().manual_seed(0), flip=view.mirror)
    flipped = (moved - points).abs().amax((1, 2)) > 1
    assert 4 < flipped.sum() < 28
    assert (moved[:, 0, 0] < moved[:, 1, 0]).all() and (moved[:, 2, 0] < moved[:, 3, 0]).all()
    assert torch.allclose(moved[flipped][0, :, 0], torch.tensor([57.0, 97, 17, 117]), atol=1e-3)


def test_no_augmentation_changes_nothing_and_the_generator_decides_everything():
    images, points = torch.rand(3, 1, 32, 32), torch.rand(3, 4, 2) * 31
    same, still = radiograph.augment(images, points, torch.Generator().manual_seed(1))
    assert torch.allclose(same, images, atol=1e-4) and torch.allclose(still, points, atol=1e-4)
    torch.manual_seed(5)
    a, _ = radiograph.augment(images, None, torch.Generator().manual_seed(1), rotation_deg=9, gamma=0.2)
    torch.rand(7)
    b, _ = radiograph.augment(images, None, torch.Generator().manual_seed(1), rotation_deg=9, gamma=0.2)
    c, _ = radiograph.augment(images, None, torch.Generator().manual_seed(2), rotation_deg=9, gamma=0.2)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_damaged_file_has_one_reason():
    """It is part of a run's bytes, which are the same in every process: no address of where something lay."""
    with pytest.raises(radiograph.Unreadable, match="cannot identify image file <_io.BytesIO object>"):
        radiograph.decode(b"\x89PNG and nothing else", "a.png")


@real_data
def test_real_radiographs_decode():
    for file in sorted((DATA / "dogs").iterdir()):
        image = radiograph.decode(file.read_bytes(), file.name)
        height, width = image.shape
        assert 100 < np.ptp(image) and width > height  # canine lateral films lie on their side
    dark = radiograph.decode((DATA / "dogs" / "mendeley_vhs_1_12bit.dcm").read_bytes())
    assert dark.shape == pydicom.dcmread(DATA / "dogs" / "mendeley_vhs_1_12bit.dcm").pixel_array.shape
    assert dark[:50, :200].mean() < dark.mean()  # air outside the dog is darker than the dog

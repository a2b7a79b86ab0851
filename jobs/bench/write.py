"""`vhs bench write`: images into shards, our encoder and tar writer beside webdataset's."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from jobs.bench.race import Result, Row, race, rows


def write(images: int = 96, repeats: int = 5, size_px: int = 512, view: str = "canine_lateral") -> Result:
    """Our encoder and shard writer beside webdataset's ShardWriter, on the same grey phantoms, one core."""
    from jobs import world
    from vhs.phantom import draw_many

    pictures, _ = draw_many(view, "clinic", range(min(images, 8)), size_px)
    pictures = [pictures[i % len(pictures)] for i in range(images)]
    with tempfile.TemporaryDirectory() as scratch:
        files = {"vhs: encode_png, write_tar": Path(scratch) / "vhs.tar"}
        contenders = {"vhs: encode_png, write_tar": lambda: _write_ours(pictures, files["vhs: encode_png, write_tar"])}
        missing = []
        try:
            from webdataset import ShardWriter
        except ImportError:
            missing = [Row("webdataset", None, None, note="not installed: pip install webdataset")]
        else:
            for name, mode in (("webdataset ShardWriter, PNG by default (RGB)", "RGB"), ("webdataset ShardWriter, PNG grey", "L")):
                files[name] = Path(scratch) / f"{mode}-000000.tar"
                pattern = f"{scratch}/{mode}-%06d.tar"
                contenders[name] = lambda mode=mode, pattern=pattern: _write_theirs(ShardWriter, pictures, mode, pattern)
        rates = race(contenders, images, repeats, time.process_time)
        sizes = {name: file.stat().st_size // images for name, file in files.items()}
    return Result("write", "images per core-second", world.cpu_name(), images, repeats, [*rows(rates, sizes), *missing])


def _write_ours(pictures: list[np.ndarray], file: Path):
    from shards.sample import Sample
    from shards.writer import write_tar
    from vhs.radiograph import encode_png

    write_tar((Sample(f"{number:016x}", {"png": encode_png(picture)}) for number, picture in enumerate(pictures)), file)


def _write_theirs(writer, pictures: list[np.ndarray], mode: str, pattern: str):
    from PIL import Image

    with writer(pattern, maxcount=len(pictures), verbose=0) as out:
        for number, picture in enumerate(pictures):
            out.write({"__key__": f"{number:016x}", "png": Image.fromarray(picture).convert(mode)})

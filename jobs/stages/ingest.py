"""ingest: what users bring -> grey 8-bit images of one size in shards, each with its patient, source, class and key points.

Every image of a run, real or generated, has the same size, depth and codec, else the codec would tell the classifier where an image is from.
Bad input is never dropped in silence: each rejected file is listed with its reason in its unit's facts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from jobs.unit import Shard, Unit

NAME, FOLDER, KIND, TORCH = "ingest", "real", "parquet", False
SCIENCE = ("view", "resolution", "data", "edges", "high_is_large", "phantoms", "ingest")
AFTER = ()


def units(run) -> list[Unit]:
    """One unit for each `ingest.shard_images` sources, in the order of the frozen list of sources."""
    sources = run.freeze("real/sources.json", lambda: run.sources)
    size = run.config.ingest.shard_images
    return [
        run.unit(NAME, f"{FOLDER}/{n:05d}", {}, params={"sources": sources[start : start + size]})
        for n, start in enumerate(range(0, len(sources), size))
    ]


def sources(config) -> list[dict]:
    """Every source with the sha256 of its bytes: the data's content, not only its names, is what the run is made of. SourceError for unusable data."""
    from vhs.phantom import ANATOMY
    from vhs.sources import SourceError, scan

    if config.data != "phantoms":
        found = [source.as_dict() for source in scan(Path(config.data).expanduser().absolute(), config.measure)]
        first: dict[str, str] = {}
        for source in found:
            file = Path(source["file"])
            source["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
            source["copy_of"] = first.setdefault(source["sha256"] or source["file"], source["file"])
        return found
    if config.view not in ANATOMY:
        raise SourceError(f"data = 'phantoms': they are drawn for {', '.join(ANATOMY)}, not for {config.view}: give a folder or a CSV")
    drawn = config.phantoms
    return [
        {
            "file": f"phantom-{i:05d}",
            "patient": f"patient-{i // drawn.images_per_patient:05d}",
            "source": drawn.style,
            "phantom": drawn.seed * 1_000_000 + i,
            "split": ("train" if i < drawn.count else "test") if drawn.test_count else None,
        }
        for i in range(drawn.count + drawn.test_count)
    ]


def work(config, inputs, output) -> Shard:
    import numpy as np
    import pyarrow as pa

    from shards.sample import Sample, sample_key
    from vhs.measure import CLASSES
    from vhs.radiograph import Letterbox, encode_png

    view, samples, rows, rejects = config.measure, [], [], []
    for source in inputs.params["sources"]:
        try:
            data, image, points = _read(source, config)
            label, index = _label(source, points, view, image.shape)
        except Rejected as reason:
            rejects.append({"file": source["file"], "reason": str(reason)})
            continue
        key, (height, width) = sample_key(data), image.shape
        samples.append(Sample(key, {"png": encode_png(Letterbox(width, height, config.resolution).image(image))}))
        rows.append(
            {
                "origin": Path(source["file"]).name,
                "patient": source.get("patient"),
                "source": source.get("source") or config.ingest.source,
                "label": label,
                "index": index,
                "points": None if points is None else np.asarray(points, np.float32).ravel().tolist(),
                "width": width,
                "height": height,
                "split": source.get("split"),
            }
        )
    columns = pa.Table.from_pylist(rows, schema=_schema())
    counts = {name: sum(row["label"] == number for row in rows) for number, name in enumerate(CLASSES)}
    return Shard(samples, columns, {"images": len(rows), "classes": counts, "rejects": rejects})


class Rejected(Exception):
    """Why one source is not used."""


def _schema():
    import pyarrow as pa

    return pa.schema(
        [
            ("origin", pa.string()),
            ("patient", pa.string()),
            ("source", pa.string()),
            ("label", pa.int64()),
            ("index", pa.float64()),
            ("points", pa.list_(pa.float32())),
            ("width", pa.int64()),
            ("height", pa.int64()),
            ("split", pa.string()),
        ]
    )


def _read(source: dict, config):
    """-> (source bytes, grey image uint8 [H, W], key points [K, 2] in its pixels or None)."""
    from vhs.radiograph import Unreadable, decode, encode_png

    if "phantom" in source:
        from vhs.phantom import draw

        phantom = draw(
            config.view, config.phantoms.style, source["phantom"], size_px=config.phantoms.size_px, prior=config.phantoms.class_prior
        )
        return encode_png(phantom.image), phantom.image, phantom.points
    if source["copy_of"] != source["file"]:
        raise Rejected(f"the same bytes as {source['copy_of']}")
    if source["sha256"] is None:
        raise Rejected("no such file")
    data = Path(source["file"]).read_bytes()  # a file that was there and cannot be read now fails the unit: it may be back tomorrow
    if hashlib.sha256(data).hexdigest() != source["sha256"]:
        raise ValueError(f"{source['file']} changed since the run began: put it back, or start a new run with the new data")
    try:
        return data, decode(data, source["file"]), source["points"]
    except Unreadable as error:
        raise Rejected(str(error)) from None


def _label(source: dict, points, view, shape) -> tuple[int, float]:
    """Class and index of an image: measured where there are key points, given otherwise."""
    import numpy as np

    from vhs.measure import CLASSES

    if points is None:
        if source["label"] is None:
            raise Rejected("neither a class nor a full set of key points")
        return CLASSES.index(source["label"]), float("nan")
    points = np.asarray(points, np.float64)
    height, width = shape
    if not np.isfinite(points).all() or (points < -0.5).any() or (points[:, 0] > width - 0.5).any() or (points[:, 1] > height - 0.5).any():
        raise Rejected(f"key points outside the image of {width} x {height} pixels")
    index = float(view.measure(points))
    if not np.isfinite(index):
        raise Rejected(f"{view.index} cannot be measured: two key points coincide")
    return int(view.classify(index)), index

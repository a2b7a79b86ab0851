"""ingest: what users bring -> grey 8-bit images of one size in shards, each with its patient, source, class and key points.

Every image of a run, real or generated, has the same size, depth and codec, else the codec would tell the classifier where an image is from.
Bad input is never dropped in silence: each rejected file is listed with its reason in its unit's facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath

from jobs.config import PHANTOMS
from jobs.data import Data, open_data
from jobs.unit import Shard, Unit
from vhs.contained import Contained, Died
from vhs.sources import SourceError

NAME, FOLDER, KIND, TORCH = "ingest", "real", "parquet", False
SCIENCE = ("view", "resolution", "data", "edges", "high_is_large", "phantoms", "ingest")
AFTER = ()


def units(run) -> list[Unit]:
    """One unit for each `ingest.shard_images` sources, in the order of the frozen list of sources."""
    from jobs.plan import SOURCES

    sources = run.freeze(SOURCES, lambda: run.sources)
    size = run.config.ingest.shard_images
    return [
        run.unit(NAME, f"{FOLDER}/{n:05d}", {}, params={"sources": sources[start : start + size]})
        for n, start in enumerate(range(0, len(sources), size))
    ]


def sources(config) -> list[dict]:
    """Every source with the sha256 of its bytes: the data's content, not only its names, is what the run is made of. SourceError for unusable data."""
    from vhs.phantom import ANATOMY

    if config.data != PHANTOMS:
        found = open_data(config.data).listed(config.measure, config.ingest.class_order)
        _reject_copies(found)
        _refuse_unlabelled_test(found, config)
        _refuse_unteachable(found, config)
        return found
    if config.view not in ANATOMY:
        raise SourceError(f"data = 'phantoms': they are drawn for {', '.join(ANATOMY)}, not for {config.view}: give a folder or a CSV")
    drawn = config.phantoms
    return [
        {
            "file": f"phantom-{i:05d}",
            "origin": f"phantom-{i:05d}",
            "patient": f"patient-{i // drawn.images_per_patient:05d}",
            "source": drawn.style,
            "phantom": drawn.seed * 1_000_000 + i,
            "split": ("train" if i < drawn.count else "test") if drawn.test_count else None,
        }
        for i in range(drawn.count + drawn.test_count)
    ]


def _reject_copies(found: list[dict]):
    """Of files with the same bytes one stays: a test image before a valid one before a training one, so that the copy that goes is never
    the reported one; then the one that knows most. Where they are filed under different classes none stays: which is right only a person can say."""

    def worth(source: dict) -> tuple:
        part = {"test": 0, "valid": 1}.get(source["split"], 2)
        return part, source["points"] is None, source["index"] is None, source["label"] is None, source["file"]

    alike: dict[str, list[dict]] = {}
    for source in sorted((source for source in found if not source["reject"] and source["sha256"]), key=worth):
        alike.setdefault(source["sha256"], []).append(source)
    for kept, *copies in alike.values():
        stated = {source["label"]: source["file"] for source in (kept, *copies) if source["label"]}
        if len(stated) > 1:
            for source in (kept, *copies):
                source["reject"] = "contradiction: the same bytes are " + ", ".join(f"{label} in {file}" for label, file in stated.items())
            continue
        for source in copies:
            across = f" ({kept['split']}), so the {source['split']} copy is dropped" if kept["split"] != source["split"] else ""
            source["reject"] = f"the same bytes as {kept['file']}{across}"


def _refuse_unlabelled_test(found: list[dict], config):
    """A test split without labels says nothing of accuracy: then folds have to, and one who asked for none hears it first of all."""
    test = [source for source in found if source["split"] == "test" and not source["reject"]]
    known = [source for source in test if source["points"] or source["label"] or source["index"] is not None]
    if test and not known and not config.split.folds:
        raise SourceError(
            f"none of the {len(test)} test images of {config.data} has a label and split.folds is 0, so no accuracy could be reported: "
            "set split.folds=5 (or another number from 2) to have it from cross-validation, or add the labels"
        )


def _refuse_unteachable(found: list[dict], config):
    """Classes alone teach nobody to measure; who would label the generated images is asked before anything is made."""
    train = [source for source in found if source["split"] != "test" and not source["reject"]]
    if train and config.label_by == "measure" and config.labeller.steps and not any(source["points"] for source in train):
        raise SourceError(
            f"the {len(train)} training images of {config.data} have classes but no key points, so the labeller cannot learn to measure them. Add the "
            "points; or set labeller.steps=0 (the packaged labeller measures as it is), label_by=prompt (the prompted class is the label), "
            "label_by=teacher (a classifier trained on the real images labels) or label_by=hand (a person does: vhs labels)"
        )
    if train and config.labeller.init == "scratch" and not (config.labeller.steps and any(source["points"] for source in train)):
        raise SourceError(
            f"labeller.init=scratch: nothing would teach it to measure, with {config.labeller.steps} steps on the {len(train)} training images of "
            f"{config.data}. Add key points and labeller.steps, or begin with labeller.init=packaged or a labeller's folder"
        )


def work(config, inputs, output) -> Shard:
    import numpy as np
    import pyarrow as pa

    from shards.sample import Sample, sample_key
    from vhs.duplicates import perceptual_hash
    from vhs.measure import CLASSES, UNKNOWN
    from vhs.radiograph import Letterbox, encode_png
    from vhs.sources.label import Unusable, settle

    view, samples, rows, rejects = config.measure, [], [], []
    for source, read in _each(inputs.params["sources"], config):
        try:
            data, image, points, spacing = read()
            label, index = settle(source, points, view, image.shape)
        except (Rejected, Unusable) as reason:
            rejects.append({"file": source["file"], "reason": str(reason)})
            continue
        key, (height, width) = sample_key(data), image.shape
        stored = Letterbox(width, height, config.resolution).image(image)
        samples.append(Sample(key, {"png": encode_png(stored)}))
        rows.append(
            {
                "origin": source["origin"],
                "patient": source.get("patient"),
                "source": source.get("source") or config.ingest.source,
                "label": label,
                "index": index,
                "points": None if points is None else np.asarray(points, np.float32).ravel().tolist(),
                "width": width,
                "height": height,
                "split": source.get("split"),
                "pixel_spacing_mm": spacing,
                "phash": perceptual_hash(stored),
            }
        )
    columns = pa.Table.from_pylist(rows, schema=_schema())
    counts = {name: sum(row["label"] == number for row in rows) for number, name in enumerate(CLASSES)}
    counts |= {"unknown": unknown} if (unknown := sum(row["label"] == UNKNOWN for row in rows)) else {}
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
            ("pixel_spacing_mm", pa.float64()),
            ("phash", pa.string()),
        ]
    )


def _each(found: list[dict], config) -> Iterator[tuple[dict, Callable]]:
    """Each source, and how to have it: () -> (source bytes, grey image uint8 [H, W], key points [K, 2] in its pixels or None, mm a pixel or None)."""
    if found and "phantom" in found[0]:
        yield from ((source, partial(_draw, source, config)) for source in found)
        return
    yield from decoded(open_data(config.data), found, config)


def decoded(data: Data, found: list[dict], config) -> Iterator[tuple[dict, Callable]]:
    """As _each, of sources that lie in `data`."""
    with Contained() as contained:
        for source, read in data.read_ahead(found):
            yield source, partial(_decode, source, read, config, contained)


def _draw(source: dict, config):
    from vhs.phantom import draw
    from vhs.radiograph import encode_png

    phantom = draw(config.view, config.phantoms.style, source["phantom"], size_px=config.phantoms.size_px, prior=config.phantoms.class_prior)
    return encode_png(phantom.image), phantom.image, phantom.points, None


def _decode(source: dict, data: bytes | None, config, contained: Contained):
    from vhs.radiograph import Unreadable, film

    if source["reject"]:
        raise Rejected(source["reject"])
    name = PurePosixPath(source["file"]).name
    try:
        image, header = contained.call(film, data, name)
    except Unreadable as error:
        raise Rejected(str(error).removeprefix(f"{name}: ")) from None
    except Died as death:
        raise Rejected(str(death)) from None
    except RuntimeError as error:
        raise RuntimeError(f"{source['file']}: {error}") from None
    if header.burned_in and config.ingest.burned_in_annotation == "reject":
        raise Rejected("BurnedInAnnotation is YES: the pixels may name the patient (ingest.burned_in_annotation=keep uses it)")
    return data, image, source["points"], header.pixel_spacing_mm

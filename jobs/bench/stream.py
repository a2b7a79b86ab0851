"""`vhs bench stream`: decoded images a second out of shards, from this disk and from an object store, beside webdataset and mosaicml-streaming.

Everyone shuffles, reads the same PNG bytes, decodes them by the same function and stacks them in batches, in one process on one core. Their caches are warm,
for the first turn is not counted; the rows that keep nothing say so.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from uuid import uuid4

import numpy as np

from jobs.bench.race import Result, Row, race, rows
from shards.storage import OBJECTS, Storage, open_storage

BATCH, ROOMY = 32, "1000"  # images; GB of cache, more than there will be
STREAMING = "not installed: pip install --no-deps mosaicml-streaming; pip install boto3 brotli catalogue cramjam python-snappy xxhash zstd"


def stream(url: str, images: int = 2048, repeats: int = 5, size_px: int = 224, shard_images: int = 256) -> Result:
    """`url`: a place in an object store, s3://bucket/prefix; what is written there goes again."""
    from jobs import world
    from jobs.config import ConfigError

    if url.partition("://")[0] not in OBJECTS:
        raise ConfigError(f"--url {url}: a place in an object store, such as s3://bucket/scratch; what lies on this disk is measured beside it anyway")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for all that reads: the server, if it is here, is to have another
    with tempfile.TemporaryDirectory() as scratch, _set(VHS_CACHE_DIR=f"{scratch}/vhs", VHS_CACHE_GB=ROOMY):
        here, there = open_storage(Path(scratch) / "shards"), open_storage(f"{url.rstrip('/')}/bench-{uuid4().hex[:12]}")
        try:
            for storage in (here, there):
                _write(storage, images, size_px, shard_images, Path(scratch))
            contenders = {
                "vhs: shards on this disk": lambda: _ours(here),
                "vhs: S3, whole shards, in the cache": lambda: _ours(there),
                "vhs: S3, images one by one (a cache without room)": lambda: _ours(there, cache_gb="0"),
            }
            missing = []
            for others in (_webdataset, _mosaicml):
                try:
                    contenders |= others(here, there, Path(scratch))
                except ImportError as error:
                    missing.append(Row(others.__name__.strip("_"), None, None, note=f"{STREAMING} ({error.name})"))
            expected = images // BATCH + bool(images % BATCH)
            rates = race({name: lambda work=work: _counted(work(), expected) for name, work in contenders.items()}, images, repeats, time.perf_counter)
        finally:
            for name in there.list():
                there.delete(name)
    return Result("stream", "samples per second", world.cpu_name(), images, repeats, [*rows(rates), *missing])


@contextmanager
def _set(**variables: str):
    """Within, the environment has these `variables`."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _write(storage: Storage, images: int, size_px: int, shard_images: int, scratch: Path):
    import pyarrow as pa

    from shards.sample import Sample
    from shards.writer import commit_shard
    from vhs.phantom import draw_many
    from vhs.radiograph import encode_png

    pictures = [encode_png(picture) for picture in draw_many("canine_lateral", "clinic", range(min(images, 16)), size_px)[0]]
    for number, first in enumerate(range(0, images, shard_images)):
        some = [Sample(f"{i:016x}", {"png": pictures[i % len(pictures)]}) for i in range(first, min(first + shard_images, images))]
        commit_shard(storage, "", number, "bench", some, pa.table({"number": range(len(some))}), {}, scratch)


def _counted(batches: Iterable[np.ndarray], expected: int):
    """All of them, looked at: who reads fewer images than there are would win."""
    found = [batch.shape for batch in batches]
    if len(found) != expected or len({shape[1:] for shape in found}) != 1:
        raise RuntimeError(f"{len(found)} batches of {sorted(set(found))} came, {expected} were expected")


def _ours(storage: Storage, cache_gb: str = ROOMY) -> Iterable[np.ndarray]:
    from shards import manifest, reader
    from vhs.radiograph import decode_png

    with _set(VHS_CACHE_GB=cache_gb):
        shards = reader.ShardReader(storage, manifest.load(storage, ""))
        order = reader.permutation(len(shards), 0, time.monotonic_ns())
        yield from (np.stack(some) for *_, some in reader.stream(shards, order, BATCH, 0, 1, workers=1, decode=decode_png))


def _webdataset(here: Storage, there: Storage, scratch: Path) -> dict[str, Callable]:
    """From S3 as its documentation reads over the web, `pipe:curl`, by URLs that carry a signature: it has no S3 of its own."""
    import webdataset
    from obstore import sign
    from obstore.store import from_url

    from vhs.radiograph import decode_png

    def read(urls: list[str], cache: Path | None = None) -> Iterable[np.ndarray]:
        source = webdataset.WebDataset(urls, shardshuffle=100, cache_dir=cache and str(cache))
        return source.shuffle(1000).to_tuple("png").map(lambda sample: decode_png(sample[0])).batched(BATCH, collation_fn=np.stack)

    tars = [name for name in there.list() if name.endswith(".tar")]
    signed = [sign(from_url(there.url, client_options={"allow_http": True}), "GET", name, timedelta(days=1)) for name in tars]
    local, piped = [str(here.local(name)) for name in tars], [f"pipe:curl -sf '{address}'" for address in signed]
    kept = scratch / "webdataset"
    kept.mkdir()
    return {
        "webdataset: tars on this disk": lambda: read(local),
        "webdataset: S3 by pipe:curl, in its cache": lambda: read(piped, kept),
        "webdataset: S3 by pipe:curl, nothing kept": lambda: read(piped),
    }


def _mosaicml(here: Storage, there: Storage, scratch: Path) -> dict[str, Callable]:
    """The same bytes in its own format."""
    from streaming import MDSWriter, StreamingDataset

    from shards import manifest, reader
    from vhs.radiograph import decode_png

    written, tar = scratch / "mds", next(name for name in here.list() if name.endswith(".tar"))
    shards = reader.ShardReader(here, manifest.load(here, ""))
    with MDSWriter(out=str(written), columns={"png": "bytes"}, size_limit=here.size(tar)) as out:
        for i in range(len(shards)):
            out.write({"png": shards.read(i)})
    for file in written.iterdir():
        there.commit(f"mds/{file.name}", file)
    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", ""))
    dataset = StreamingDataset(remote=f"{there.url}/mds", local=str(scratch / "mosaicml"), shuffle=True, batch_size=BATCH)

    def read() -> Iterable[np.ndarray]:
        some = []
        for sample in dataset:
            some.append(decode_png(sample["png"]))
            if len(some) == BATCH:
                yield np.stack(some)
                some = []
        if some:
            yield np.stack(some)

    return {"mosaicml-streaming: S3, in its cache": read}

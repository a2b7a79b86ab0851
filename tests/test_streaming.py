"""Images from an object store: the bytes of a local disk whatever the network does, in bounded memory and cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROOT
from flaky import ONCE_MORE, Flaky

from shards import manifest
from shards.reader import DamagedShard, ShardReader, permutation, stream
from shards.sample import Sample, sample_key
from shards.storage import open_storage
from shards.writer import commit_shard
from vhs.radiograph import encode_png

SHARDS, IMAGES = 3, 8  # of each
WHOLE, PART = "20", "0.00001"  # GB of cache: room for all shards, and for none


def shard(url: str, number: int, images: list[bytes]):
    samples = [Sample(sample_key(image), {"png": image}) for image in images]
    columns = pa.table({"label": list(range(len(images)))})
    with tempfile.TemporaryDirectory() as scratch:
        commit_shard(open_storage(url), "g", number, "id", samples, columns, {}, Path(scratch))


def fill(url: str, shards: int = SHARDS, images: int = IMAGES, size: int = 3000) -> list[bytes]:
    """Shards at `url` -> their images in order."""
    draw = np.random.default_rng(0)
    made = [[draw.bytes(size + n) for n in range(images)] for _ in range(shards)]
    for number, some in enumerate(made):
        shard(url, number, some)
    return [image for some in made for image in some]


@pytest.fixture
def images(bucket) -> list[bytes]:
    return fill(bucket)


def opened(url: str) -> ShardReader:
    storage = open_storage(url)
    return ShardReader(storage, manifest.load(storage, "g"))


@pytest.mark.parametrize("cache_gb", [WHOLE, PART])
@pytest.mark.parametrize("harm", ONCE_MORE)
def test_trouble_that_passes_changes_no_byte(harm, cache_gb, bucket, images, flaky: Flaky, monkeypatch):
    monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
    shards = opened(bucket)
    flaky.harm = [harm] * 3
    order = permutation(len(images), 1, 0)
    read = [image for *_, some in stream(shards, order, 5, 0, 1, workers=2) for image in some]
    assert read == [images[i] for i in order] and not flaky.harm


@pytest.mark.parametrize("cache_gb", [WHOLE, PART])
def test_a_damaged_answer_is_asked_for_again(cache_gb, bucket, images, flaky: Flaky, monkeypatch):
    monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
    shards = opened(bucket)
    first = int(np.argmax([len(image) for image in images[:IMAGES]]) // 2)  # of a whole tar the middle is in one of the images
    flaky.harm = ["damaged"]
    assert [shards.read(i) for i in (first, *range(len(images)))] == [images[i] for i in (first, *range(len(images)))] and not flaky.harm


@pytest.mark.parametrize("cache_gb", [WHOLE, PART])
def test_damage_that_stays_is_named_by_shard_and_offset(cache_gb, bucket, images, monkeypatch):
    monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
    storage = open_storage(bucket)
    row = manifest.load(storage, "g").to_pylist()[11]
    tar = storage.read(row["path"])
    for damaged in (tar.replace(images[11], images[11][:-1] + b"?"), tar[: row["offset"] + 7]):
        storage.put(row["path"], damaged)
        with pytest.raises(DamagedShard) as error:
            opened(bucket).read(11)
        assert row["path"] in str(error.value) and f"offset {row['offset']}" in str(error.value)
        assert opened(bucket).read(3) == images[3], "other shards are as they were"


def test_a_refused_right_ends_it_at_once_and_is_named(bucket, images, flaky: Flaky):
    shards = opened(bucket)
    flaky.always = "403"
    asked = len(flaky.asked)
    with pytest.raises(PermissionError, match="refuses s3:GetObject to AWS_ACCESS_KEY_ID key"):
        shards.read(0)
    assert [method for method, _ in flaky.asked[asked:]].count("GET") == 1


def test_trouble_that_stays_is_an_error_in_the_end(bucket, images, flaky: Flaky, monkeypatch):
    monkeypatch.setattr("shards.objects.PATIENCE_S", 2)
    shards = opened(bucket)
    flaky.always = "503"
    with pytest.raises(OSError, match="SlowDown, as asked for, asked again for"):
        shards.read(0)


def test_shards_are_fetched_once_where_they_have_room_and_images_one_by_one_where_not(bucket, images, flaky: Flaky, monkeypatch):
    """Two epochs of two ranks of a machine."""
    for cache_gb, fetches in ((WHOLE, SHARDS), (PART, 2 * len(images))):
        monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
        ranks, since = [opened(bucket) for _ in range(2)], len(flaky.asked)
        for epoch in range(2):
            order = permutation(len(images), 1, epoch)
            read = [image for rank in range(2) for *_, some in stream(ranks[rank], order, 4, rank, 2, workers=1) for image in some]
            assert sorted(read) == sorted(images)
        asked = [method for method, name in flaky.asked[since:] if name.endswith(".tar")]
        assert asked.count("GET") == fetches and (cache_gb == WHOLE or asked.count("HEAD") == 0)


def test_memory_holds_images_and_no_shard(bucket, tmp_path, monkeypatch, peak):
    """A shard of 192 MB."""
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    made = fill(bucket, shards=1, images=96, size=2 << 20)
    for cache_gb in (WHOLE, PART):
        monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
        shards, order = opened(bucket), permutation(len(made), 0, 0)
        most = peak()
        for indices, *_, some in stream(shards, order, 2, 0, 1, workers=1, read_ahead=2):
            assert [len(image) for image in some] == [len(made[i]) for i in indices]
        assert most() < 80 << 20, f"{most()} bytes at once"


READ = """
import sys
import numpy as np
import pandas as pd
from jobs import batches, world
from shards import manifest
from shards.storage import open_storage

world.set_environment(1)
storage = open_storage(sys.argv[1])
rows = manifest.load(storage, "g").to_pandas()
epochs = batches.Epochs(storage, rows, 32, batches.shuffled(len(rows), 0))
seen = [key for batch in epochs(0, 0) for key, weight in zip(batch["key"], batch["weight"].tolist()) if weight]
print("\\n".join(seen))
"""


def pss_gib(processes: list[subprocess.Popen]) -> float:
    """What they hold of this machine's memory, pages that several share counted once: each its share."""
    total = 0
    for process in processes:
        with suppress(FileNotFoundError, ProcessLookupError, StopIteration):  # it has ended
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            total += int(next(line for line in lines if line.startswith("Pss:")).split()[1])
    return total / (1 << 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("cache_gb", [WHOLE, "1"], ids=["whole", "one by one"])
def test_two_workers_stream_far_more_than_they_hold(cache_gb, bucket, tmp_path, monkeypatch, figure):
    """VHS_TEST_STREAM_GB of shards, 10 by default, of 256 MB each, through the batches of a training."""
    gb = float(os.environ.get("VHS_TEST_STREAM_GB", 10))
    if shutil.disk_usage(tmp_path).free < 3 * gb * 1e9:
        pytest.skip(f"needs {3 * gb:g} GB of free disk, or fewer in VHS_TEST_STREAM_GB")
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VHS_CACHE_GB", cache_gb)
    draw, held = np.random.default_rng(0), 256_000_000
    pictures = [encode_png(draw.integers(0, 256, (512, 512), np.uint8)) for _ in range(32)]
    each, keys = held // len(pictures[0]), []
    for number in range(-(-int(gb * 1e9) // held)):
        some = [Sample(f"{number:08x}{n:08x}", {"png": pictures[n % 32]}) for n in range(each)]
        commit_shard(open_storage(bucket), "g", number, "id", some, pa.table({"n": range(each)}), {}, tmp_path / "scratch")
        keys += [sample.key for sample in some]
    began, most = time.monotonic(), 0.0
    ranks = [
        subprocess.Popen([sys.executable, "-c", READ, bucket], cwd=ROOT, env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, text=True,
                         stdout=(tmp_path / f"{rank}.txt").open("w"))
        for rank in range(2)
    ]  # fmt: skip
    while any(rank.poll() is None for rank in ranks):
        most = max(most, pss_gib(ranks))
        time.sleep(0.2)
    shutil.rmtree(tmp_path / "cache")
    seen = [key for rank in range(2) for key in (tmp_path / f"{rank}.txt").read_text().split()]
    took = time.monotonic() - began
    figure(f"{len(keys) * len(pictures[0]) / 1e9:.1f} GB, {len(seen)} images, at most {most:.2f} GiB (PSS) of two workers, {len(seen) / took:.0f} images/s")
    assert [rank.returncode for rank in ranks] == [0, 0] and sorted(seen) == sorted(keys) and 0 < most <= 1.5

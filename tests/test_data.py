"""Data from anywhere: the same files on disk and in object storage are the same run; shards that others wrote; memory that does not grow with them."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from conftest import committed, vhs
from PIL import Image
from scipy.io import savemat
from test_resume import assert_same

from jobs.data import Data, open_data
from jobs.plan import reopen
from shards import manifest, ranges
from shards.storage import open_storage
from vhs.measure import CLASSES, VIEWS
from vhs.phantom import draw
from vhs.sources import SourceError, tars

DOG = VIEWS["canine_lateral"]


def png(seed: int) -> tuple[bytes, np.ndarray]:
    dog = draw("canine_lateral", "clinic", seed, size_px=64)
    Image.fromarray(dog.image).save(file := io.BytesIO(), "PNG")
    return file.getvalue(), dog.points


def upload(folder: Path, url: str) -> str:
    storage = open_storage(url)
    for file in (file for file in folder.rglob("*") if file.is_file()):
        storage.put(file.relative_to(folder).as_posix(), file.read_bytes())
    return url


def table(folder: Path, count: int = 9) -> Path:
    (folder / "images").mkdir(parents=True)
    with (folder / "labels.csv").open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["file", "patient", *(f"{name}_{axis}" for name in DOG.points for axis in "xy")])
        for number in range(count):
            data, points = png(number)
            (folder / "images" / f"{number}.png").write_bytes(data)
            rows.writerow([f"{number}.png", f"dog {number}", *points.ravel().tolist()])
        rows.writerow(["lost.png", "", *[""] * 12])
    return folder


def tree(folder: Path) -> Path:
    for number in range(6):
        data, points = png(number)
        for name in ("Images", "Labels"):
            (folder / "Train" / name).mkdir(parents=True, exist_ok=True)
        (folder / "Train" / "Images" / f"{number}.png").write_bytes(data)
        savemat(folder / "Train" / "Labels" / f"{number}.mat", {"six_points": points})
    (folder / "Train" / "Images" / "alone.png").write_bytes(png(50)[0])
    return folder


def shard(file: Path, samples: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for name, data in samples.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1700000000.5  # as webdataset's writer: a PAX header for each
            tar.addfile(member, io.BytesIO(data))
    return file


def shards(folder: Path) -> Path:
    """Two shards: key points and patients in .json, classes in .cls and .txt, a caption, an image without a word."""
    first = {}
    for number in range(4):
        data, points = png(number)
        first |= {f"{number}.png": data, f"{number}.json": json.dumps({"six_points": points.tolist(), "patient": f"dog {number}"}).encode()}
    shard(folder / "part-000.tar", first)
    second = {f"a/{n}.png": png(10 + n)[0] for n in range(4)} | {"a/0.cls": b"1\n", "a/1.txt": b"large", "a/2.txt": b"a dog", "a/3.json": b'{"class": "small"}'}
    shard(folder / "part-001.tar", dict(sorted(second.items())))
    return folder


def ingested(data, run, code: int = 0) -> str:
    return " ".join(vhs("ingest", data, "--view", "canine_lateral", "--resolution", 64, "--out", run, code=code).split())


@pytest.mark.parametrize("make", [table, tree, shards])
def test_the_same_data_on_disk_and_on_s3_is_ingested_to_the_same_bytes(make, bucket, tmp_path, figure):
    data = make(tmp_path / "data")
    if make is shards:
        (data / "part-001.tar").unlink()  # has classes by number, which `vhs ingest` cannot be told
    ingested(data, tmp_path / "local")
    ingested(upload(data, f"{bucket}/data"), tmp_path / "far")
    assert_same(tmp_path / "far", tmp_path / "local", f"{make.__name__} from S3", figure)
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "far" / "real" / "sources.json").read_text()))


@pytest.mark.slow
def test_a_run_on_real_films_from_s3_is_the_local_one(real_data, bucket, tmp_path, figure):
    vhs("run", "debug/ctr", f"data={real_data / 'ctr'}", "--out", tmp_path / "local")
    url = upload(real_data / "ctr", f"{bucket}/films")
    assert "the CSV labels.csv" in vhs("run", "debug/ctr", f"data={url}", "--out", f"{bucket}/run")
    assert_same(f"{bucket}/run", tmp_path / "local", "data and run on S3", figure)


def test_data_that_moved_is_the_same_and_other_data_is_refused(tmp_path):
    data, run = table(tmp_path / "data"), tmp_path / "run"
    ingested(data, run)
    before = committed(run)
    data.rename(tmp_path / "moved")
    ingested(tmp_path / "moved", run)
    assert committed(run) == before
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    (tmp_path / "other" / "images" / "3.png").write_bytes(png(99)[0])
    said = ingested(tmp_path / "other", run, code=1)
    assert "holds other data" in said and "1 sources, images/3.png first" in said and "--reuse" in said
    (run / "real" / "sources.json").unlink()  # and nobody compares what is not frozen
    shutil.rmtree(tmp_path / "other")
    assert "does not exist" in ingested(tmp_path / "other", tmp_path / "new", code=1)


def test_what_the_samples_of_shards_say(tmp_path):
    found = {source.file: source for source in open_data(str(shards(tmp_path))).scan(DOG, CLASSES)}
    assert sorted(found) == [f"part-000.tar/{n}.png" for n in range(4)] + [f"part-001.tar/a/{n}.png" for n in range(4)]
    for number in range(4):
        one = found[f"part-000.tar/{number}.png"]
        np.testing.assert_allclose(one.points, png(number)[1])
        assert one.patient == f"dog {number}" and not one.reject
    assert [found[f"part-001.tar/a/{n}.png"].label for n in range(4)] == ["normal", "large", None, "small"]
    assert "without a label" in found["part-001.tar/a/2.png"].reject
    data = open_data(str(tmp_path))
    assert data.read(found["part-001.tar/a/1.png"].as_dict()) == png(11)[0]
    with pytest.raises(SourceError, match=r"2 WebDataset shards .* Set ingest.class_order"):
        data.scan(DOG)


def test_shards_are_named_by_a_list_a_pattern_or_one_by_one(tmp_path):
    shards(tmp_path)
    shutil.copy(tmp_path / "part-000.tar", tmp_path / "unlisted.tar")
    (tmp_path / "shards.txt").write_text("part-000.tar\npart-001.tar\n")
    for named in ("", "/shards.txt", "/part-{000..001}.tar"):
        assert len(open_data(f"{tmp_path}{named}").scan(DOG, CLASSES)) == 8
    assert len(open_data(f"{tmp_path}/part-000.tar").scan(DOG)) == 4
    with pytest.raises(SourceError, match="part-002.tar is not there"):
        open_data(f"{tmp_path}/part-{{000..002}}.tar").scan(DOG)
    for line in ("../up.tar", "/etc/up.tar", "http://user:key@there/up.tar"):
        (tmp_path / "shards.txt").write_text(line)
        with pytest.raises(SourceError, match="names a URL|outside") as told:
            open_data(str(tmp_path)).scan(DOG)
        assert "key" not in str(told.value)


def test_a_torn_shard_is_refused_whole(tmp_path):
    whole = (shards(tmp_path) / "part-000.tar").read_bytes()
    (tmp_path / "part-000.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match="part-000.tar is no plain tar"):
        open_data(str(tmp_path)).scan(DOG, CLASSES)


def test_memory_does_not_grow_with_a_shard(tmp_path, peak, figure):
    """400 MB in a shard, of which a bounded part is in memory at a time, on disk and by ranges."""
    big = tmp_path / "big.tar"
    with tarfile.open(big, "w") as tar:
        for number in range(2):
            member = tarfile.TarInfo(f"{number}.png")
            member.size = 200 << 20
            tar.addfile(member, _Zeros())
    peaks = {}
    for name, stream in (("a file", big.open("rb")), ("ranges", ranges.Ranges(lambda start, end: _part(big, start, end), big.stat().st_size))):
        most = peak()
        with stream:
            found = list(tars.members(stream))
        peaks[name] = most()
        assert [part.size for part in found] == [200 << 20] * 2
    figure(f"a shard of {big.stat().st_size >> 20} MB: peak " + ", ".join(f"{size >> 20} MB by {name}" for name, size in peaks.items()))
    of_ranges = (ranges.AHEAD + ranges.KEPT + 1) * ranges.RANGE
    assert peaks["a file"] < 24 << 20 and peaks["ranges"] < 3 * of_ranges, "what was freed is not given back at once"


class _Zeros(io.RawIOBase):
    def read(self, size: int = -1) -> bytes:
        return bytes(size)


def _part(file: Path, start: int, end: int) -> bytes:
    with file.open("rb") as data:
        data.seek(start)
        return data.read(end - start)


def test_ranges_give_the_bytes_of_the_file_wherever_they_are_read(monkeypatch):
    monkeypatch.setattr(ranges, "RANGE", 100)
    content = np.random.default_rng(0).bytes(1234)
    with ranges.Ranges(lambda start, end: content[start:end], len(content)) as file:
        for start, size in ((0, 10), (95, 10), (90, 500), (1200, 100), (3, 1), (0, -1), (1234, 5)):
            file.seek(start)
            assert file.read(size) == (content[start:] if size < 0 else content[start : start + size])
    with pytest.raises(OSError, match="changed while it was read"), ranges.Ranges(lambda start, end: b"", 50) as file:
        file.read(1)


def test_a_file_gone_from_the_bucket_fails_its_unit_and_is_no_reject(bucket, tmp_path):
    url = upload(table(tmp_path / "data"), f"{bucket}/data")
    vhs("ingest", url, "--view", "canine_lateral", "--resolution", 64, "--out", tmp_path / "run", environment={"VHS_CRASH_AT": "claim:1"}, code=-9)
    open_storage(url).delete("images/0.png")
    assert "images/0.png" in vhs("stage", "ingest", tmp_path / "run", code=1)
    open_storage(url).put("images/0.png", png(0)[0])
    vhs("stage", "ingest", tmp_path / "run")
    opened = reopen(str(tmp_path / "run"))
    assert manifest.load(opened.storage, "real").num_rows == 9 and isinstance(open_data(opened.config.data), Data)


def test_an_object_store_without_keys_says_which_to_set(tmp_path, monkeypatch):
    """The machine's role is asked for, by a service that refuses it."""

    class Refuses(BaseHTTPRequestHandler):
        def answer(self):
            self.send_error(403)

        do_GET = do_PUT = answer

        def log_message(self, *_): ...

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        role = {"AWS_METADATA_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        said = vhs("init", "s3://bucket/films", "--out", tmp_path / "mine.yaml", environment=role, code=1)
        server.shutdown()
    assert "the store refuses s3:ListBucket to what this machine's role gives" in said
    assert "AWS_ACCESS_KEY_ID is not set: export it, AWS_SECRET_ACCESS_KEY and AWS_REGION" in said and "AWS_ENDPOINT_URL" in said

"""Tars that are the same bytes every time and plain to everyone; shards that appear whole or not at all, once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import manifest
from shards.sample import Sample, encode_json, sample_key
from shards.storage import open_storage
from shards.writer import commit_shard, write_tar

ROOT = Path(__file__).resolve().parents[1]

WRITE = """
import sys
from pathlib import Path
import pyarrow as pa
from shards.sample import Sample
from shards.storage import open_storage
from shards.writer import commit_shard
samples = [Sample(f"k{n}", {"png": bytes([n]) * 50_000}) for n in range(4)]
commit_shard(open_storage(sys.argv[1]), "g", 7, "abc", iter(samples), pa.table({"seed": [0, 1, 2, 3]}), {"unit": "7"}, Path(sys.argv[2]))
"""


def samples(count: int = 3, salt: str = "") -> list[Sample]:
    images = [f"{salt}{n}".encode() * (100 + n) for n in range(count)]
    return [Sample(sample_key(image), {"png": image, "json": encode_json({"n": n, "ä": [1.5, None]})}) for n, image in enumerate(images)]


def tree(folder: Path) -> dict[str, bytes]:
    storage = open_storage(folder)
    return {name: storage.read(name) for name in storage.list()}


def test_a_tar_has_the_same_bytes_whatever_the_clock_and_the_mask(tmp_path):
    old = os.umask(0o077)
    write_tar(samples(), tmp_path / "a.tar")
    os.umask(old)
    write_tar(iter(samples()), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    # These bytes name shards for ever: if this digest changes, every finished run's tars would be written under new names.
    write_tar([Sample("key", {"png": b"image", "json": b"{}"})], tmp_path / "c.tar")
    digest = hashlib.sha256((tmp_path / "c.tar").read_bytes()).hexdigest()
    assert digest == "4def741b6b1b801dff16b274e69dcf603a1a9c580b57d3811c06c8f72d981cf8"


key = st.text("0123456789abcdefXYZ_-", min_size=1, max_size=80)
parts = st.dictionaries(st.sampled_from(["png", "json", "seg.png", "txt"]), st.binary(max_size=1500), min_size=1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(key, parts, max_size=6))
def test_tarfile_reads_back_every_member_where_it_was_said_to_be(tmp_path, content):
    members = write_tar([Sample(key, parts) for key, parts in content.items()], tmp_path / "x.tar")
    data = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "r:") as tar:
        infos = tar.getmembers()
        assert [(info.name, info.offset_data, info.size) for info in infos] == [(m.file, m.offset, m.size) for m in members]
        assert all((info.mtime, info.uid, info.gid, info.mode, info.type) == (0, 0, 0, 0o644, tarfile.REGTYPE) for info in infos)
        assert [tar.extractfile(info).read() for info in infos] == [part for parts in content.values() for part in parts.values()]
    for member in members:
        assert hashlib.sha256(data[member.offset : member.offset + member.size]).hexdigest() == member.sha256
    assert len(data) % 512 == 0 and data[-1024:] == bytes(1024)


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar command")
def test_the_tar_command_reads_it_without_a_word(tmp_path):
    write_tar(samples(), tmp_path / "x.tar")
    listed = subprocess.run(["tar", "tf", tmp_path / "x.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == [f"{s.key}.{extension}" for s in samples() for extension in s.parts] and listed.stderr == ""


def test_webdataset_reads_the_committed_shards(tmp_path):
    storage = open_storage(tmp_path / "run")
    for number in range(2):
        rows = pa.table({"n": [0, 1, 2]})
        commit_shard(storage, "g", number, "id", samples(3, salt=str(number)), rows, {}, tmp_path / "scratch")
    manifest.write_shards_txt(storage, "g")
    urls = [str(storage.local(f"g/{name}")) for name in storage.read("g/shards.txt").decode().split()]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    written = samples(3, salt="0") + samples(3, salt="1")
    assert [(item["__key__"], item["png"], item["json"]) for item in read] == [(s.key, s.parts["png"], s.parts["json"]) for s in written]


def test_the_sidecar_says_what_is_in_the_tar(tmp_path):
    storage, written = open_storage(tmp_path / "run"), samples(5)
    columns = pa.table({"seed": pa.array(range(5), pa.int64()), "prompt": ["small"] * 5}).replace_schema_metadata({"dropped": "yes"})
    assert commit_shard(storage, "generated/split", 3, "abc", written, columns, {"generator": "g1"}, tmp_path / "scratch")
    table = manifest.read(storage, "generated/split/00003-abc.parquet")
    about = manifest.metadata(table)
    tar = storage.read(f"generated/split/{about['shard']}")
    digest = hashlib.sha256(tar).hexdigest()
    shard = f"00003-{digest[:12]}.tar"
    assert about == {"shard": shard, "shard_sha256": digest, "shard_bytes": str(len(tar)), "identity": "abc", "generator": "g1"}
    assert table.column_names == [*manifest.SCHEMA.names, "seed", "prompt"]
    for row, sample in zip(table.to_pylist(), written, strict=True):
        image = sample.parts["png"]
        assert (row["key"], row["file"], row["shard"]) == (sample.key, f"{sample.key}.png", shard)
        assert tar[row["offset"] : row["offset"] + row["size"]] == image and row["sha256"] == hashlib.sha256(image).hexdigest()
    assert not any((tmp_path / "scratch").iterdir())


def test_the_same_samples_make_the_same_files(tmp_path):
    whole = pa.table({"seed": [1, 2, 3], "prompt": ["a", "a", "b"]})
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1)])
    for name, columns, about in (("a", whole, {"x": "1", "y": "2"}), ("b", chunked, {"y": "2", "x": "1"})):
        commit_shard(open_storage(tmp_path / name), "g", 0, "id", samples(), columns, about, tmp_path / "scratch")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_the_loser_adopts_the_winner_and_leaves_no_orphan(tmp_path):
    storage, columns = open_storage(tmp_path / "run"), pa.table({"seed": [1, 2, 3]})
    assert commit_shard(storage, "g", 0, "id", samples(salt="winner"), columns, {}, tmp_path / "one")
    before = tree(tmp_path / "run")
    assert not commit_shard(storage, "g", 0, "id", samples(salt="loser"), columns, {}, tmp_path / "two")
    assert tree(tmp_path / "run") == before


def test_two_attempts_racing_to_the_sidecar_leave_one_shard_and_at_most_an_orphan(tmp_path, monkeypatch):
    storage, columns = open_storage(tmp_path / "run"), pa.table({"seed": [1, 2, 3]})
    monkeypatch.setattr(storage, "exists", lambda path: False)  # the loser looked before the winner committed
    for salt in ("winner", "loser"):
        commit_shard(storage, "g", 0, "id", samples(salt=salt), columns, {}, tmp_path / salt)
    assert manifest.load(storage, "g")["key"].to_pylist() == [sample.key for sample in samples(salt="winner")]
    assert sum(name.endswith(".tar") for name in storage.list("g/")) == 2


@pytest.mark.parametrize(
    ("window", "visible"), [("tar-half-written", []), ("tar-before-sidecar", [".tar"]), ("sidecar-written-not-linked", [".tar"])]
)
def test_a_kill_at_any_window_shows_no_shard_and_a_rerun_commits_the_same_bytes(tmp_path, window, visible):
    def run(place: str, **environment: str) -> int:
        command = [sys.executable, "-c", WRITE, str(tmp_path / place), str(tmp_path / "scratch")]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False).returncode

    storage = open_storage(tmp_path / "run")
    assert run("run", VHS_CRASH_AT=window) == -signal.SIGKILL
    assert [Path(name).suffix for name in storage.list("g/")] == visible
    assert manifest.load(storage, "g").num_rows == 0 and manifest.write_shards_txt(storage, "g") == []
    storage.delete("g/shards.txt")
    if window == "tar-half-written":
        assert 0 < (tmp_path / "scratch" / "00007-abc.tar").stat().st_size < 4 * 50_000
    assert run("run") == 0 and run("undisturbed") == 0
    assert tree(tmp_path / "run") == tree(tmp_path / "undisturbed")
    assert manifest.load(storage, "g")["key"].to_pylist() == ["k0", "k1", "k2", "k3"]


def test_what_does_not_fit_is_refused_before_anything_is_committed(tmp_path):
    storage, scratch = open_storage(tmp_path / "run"), tmp_path / "scratch"
    with pytest.raises(ValueError, match="3 samples but 2 rows"):
        commit_shard(storage, "g", 0, "id", samples(), pa.table({"seed": [1, 2]}), {}, scratch)
    with pytest.raises(ValueError, match="path, sha256 are the sidecar's own"):
        commit_shard(storage, "g", 0, "id", samples(), pa.table({"sha256": list("abc"), "path": list("abc")}), {}, scratch)
    with pytest.raises(ValueError, match="shard_bytes are the sidecar's own"):
        commit_shard(storage, "g", 0, "id", samples(), pa.table({"seed": [1, 2, 3]}), {"shard_bytes": "1"}, scratch)
    with pytest.raises(ValueError, match="occurs twice"):
        commit_shard(storage, "g", 0, "id", [samples()[0]] * 3, pa.table({"seed": [1, 2, 3]}), {}, scratch)
    for number, identity in ((0, "a/b"), (0, ""), (-1, "a"), (0, "a.b")):
        with pytest.raises(ValueError, match="identity"):
            commit_shard(storage, "g", number, identity, samples(), pa.table({"seed": [1, 2, 3]}), {}, scratch)
    assert storage.list() == []


def test_an_empty_shard_is_a_shard(tmp_path):
    storage = open_storage(tmp_path / "run")
    commit_shard(storage, "g", 0, "id", [], pa.table({"seed": pa.array([], pa.int64())}), {}, tmp_path / "scratch")
    assert manifest.load(storage, "g").num_rows == 0 and storage.exists("g/00000-id.parquet")


@pytest.mark.parametrize(
    ("key", "parts"),
    [("a.b", {"png": b""}), ("a/b", {"png": b""}), ("", {"png": b""}), ("a", {}), ("a", {"PNG": b""}), ("a" * 97, {"png": b""})],
)
def test_samples_that_webdataset_would_misread_are_refused(key, parts):
    with pytest.raises(ValueError, match="sample"):
        Sample(key, parts)


def test_keys_and_json_are_functions_of_the_content():
    assert sample_key(b"radiograph") == hashlib.sha256(b"radiograph").hexdigest()[:16]
    assert encode_json({"b": 1, "a": "é"}) == encode_json({"a": "é", "b": 1}) == '{"a":"é","b":1}'.encode()
    assert json.loads(encode_json([1.25, None])) == [1.25, None]
    with pytest.raises(ValueError):
        encode_json(float("nan"))

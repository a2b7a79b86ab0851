"""Each kind of damage is found, named, and told from what is harmless."""

from __future__ import annotations

import pyarrow as pa
import pytest

from shards import manifest
from shards.sample import Sample, sample_key
from shards.storage import Storage, open_storage
from shards.verify import verify
from shards.writer import commit_shard

WORDS = ["ant" * 100, "bee" * 200, "cat" * 300]


@pytest.fixture
def storage(tmp_path) -> Storage:
    storage = open_storage(tmp_path / "run")
    for number in range(2):
        shard(storage, number, [f"{word}{number}" for word in WORDS])
    manifest.write_shards_txt(storage, "g")
    return storage


def shard(storage: Storage, number: int, words: list[str], identity: str = "id") -> str:
    samples = [Sample(sample_key(word.encode()), {"png": word.encode(), "txt": b"x"}) for word in words]
    commit_shard(storage, "g", number, identity, samples, pa.table({"word": words}), {}, storage.root.parent / "scratch")
    return manifest.sidecar_path("g", number, identity)


def first_tar(storage: Storage) -> str:
    return next(name for name in storage.list("g/") if name.endswith(".tar"))


def rewrite(storage: Storage, path: str, table: pa.Table | None = None, **about: str) -> None:
    old = manifest.read(storage, path)
    storage.put(path, manifest.encode(old if table is None else table, {**manifest.metadata(old), **about}))


@pytest.mark.parametrize("full", [False, True])
def test_a_sound_folder_has_no_findings(storage, full):
    findings = verify(storage, "g", full)
    assert findings.ok and findings.found == () and (findings.shards, findings.samples) == (2, 6)


def test_a_changed_byte_needs_the_full_look(storage):
    tar = first_tar(storage)
    storage.put(tar, storage.read(tar).replace(b"bee", b"eel", 1))
    assert verify(storage, "g").ok
    findings = verify(storage, "g", full=True)
    row = manifest.load(storage, "g").to_pylist()[1]
    assert not findings.ok and [finding.path for finding in findings.found] == ["g/00000-id.parquet"] * 2
    assert "sha256" in findings.found[0].what and f"key {row['key']} at offset {row['offset']}" in findings.found[1].what
    assert "run the same command again" in findings.found[1].to_do


@pytest.mark.parametrize("full", [False, True])
def test_torn_and_missing_tars(storage, full):
    tar = first_tar(storage)
    storage.put(tar, storage.read(tar)[:-700])
    (finding,) = verify(storage, "g", full).found
    assert finding.error and finding.what == f"{tar} has {storage.size(tar)} bytes, the sidecar says {storage.size(tar) + 700}"
    storage.delete(tar)
    (finding,) = verify(storage, "g", full).found
    assert finding.error and finding.what == f"{tar} is missing"


def test_a_tar_of_the_right_size_that_is_none(storage):
    tar = first_tar(storage)
    storage.put(tar, b"?" * storage.size(tar))
    (finding,) = verify(storage, "g").found
    assert "not a whole tar" in finding.what and finding.error


def test_rows_that_disagree_with_the_tar(storage):
    path = "g/00000-id.parquet"
    table = manifest.read(storage, path)
    rewrite(storage, path, table.slice(0, 2))
    assert ["holds 3 samples, the sidecar 2" in finding.what for finding in verify(storage, "g").found] == [True]
    moved = table.set_column(table.schema.get_field_index("offset"), "offset", pa.array([512, 0, 2048]))
    rewrite(storage, path, moved)
    assert all("(offset, size) is" in finding.what and finding.error for finding in verify(storage, "g").found)
    assert not verify(storage, "g", full=True).ok


def test_sidecars_that_disagree_with_themselves(storage):
    path = "g/00000-id.parquet"
    good = storage.read(path)
    for name, value, words in (
        ("identity", "other", "its name says otherwise"), ("shard", "00000-abc.tar", "it names the tar"),
        ("shard_sha256", "0" * 64, "it names the tar"),
    ):
        rewrite(storage, path, **{name: value})
        assert any(words in finding.what and finding.path == path for finding in verify(storage, "g").found if finding.error)
        storage.put(path, good)
    rewrite(storage, path, manifest.read(storage, path).drop_columns(["sha256"]))
    assert "it lacks sha256" in verify(storage, "g").found[0].what
    storage.put(path, good[: len(good) // 2])
    findings = verify(storage, "g")
    assert "not readable" in findings.found[0].what and findings.shards == 1


def test_a_key_in_two_shards_is_an_error_and_a_second_identity_a_note(storage):
    shard(storage, 1, ["fresh"], identity="again")
    findings = verify(storage, "g")
    assert findings.ok and any("the same shard number as g/00001-again.parquet" in finding.what for finding in findings.found)
    shard(storage, 2, [f"{WORDS[0]}0"])
    errors = [finding for finding in verify(storage, "g").found if finding.error]
    assert [error.what for error in errors] == [f"key {sample_key((WORDS[0] + '0').encode())} is also in g/00000-id.parquet"]


def test_orphans_and_an_old_shards_txt_are_reported_but_harmless(storage):
    storage.put("g/00009-0123456789ab.tar", b"half")
    shard(storage, 2, ["more"])
    findings = verify(storage, "g", full=True)
    assert findings.ok and {finding.path for finding in findings.found} == {"g/00009-0123456789ab.tar", "g/shards.txt"}

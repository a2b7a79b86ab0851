"""Each kind of damage is found, named, and told from what is harmless."""

from __future__ import annotations

import gzip
import tarfile

import pyarrow as pa
import pytest

from shards import manifest
from shards.sample import Sample, sample_key
from shards.storage import Storage, open_storage
from shards.verify import verify
from shards.writer import commit_shard

WORDS = ["ant" * 100, "bee" * 200, "cat" * 300]


@pytest.fixture(params=["disk", "s3"])
def storage(request, tmp_path) -> Storage:
    """Two shards on a disk, or on a real S3 server."""
    storage = open_storage(tmp_path / "run" if request.param == "disk" else request.getfixturevalue("bucket"))
    for number in range(2):
        shard(storage, number, [f"{word}{number}" for word in WORDS])
    manifest.write_shards_txt(storage, "g")
    return storage


def shard(storage: Storage, number: int, words: list[str], identity: str = "id") -> str:
    samples = [Sample(sample_key(word.encode()), {"png": word.encode(), "txt": b"x"}) for word in words]
    commit_shard(storage, "g", number, identity, samples, pa.table({"word": words}), {}, storage.work)
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
    (finding,) = verify(storage, "g", full=True).found
    assert "not a whole tar" in finding.what and finding.error


def test_rows_that_disagree_with_the_tar(storage):
    path = "g/00000-id.parquet"
    table = manifest.read(storage, path)
    rewrite(storage, path, table.slice(0, 2))
    assert ["holds 3 samples, the sidecar 2" in finding.what for finding in verify(storage, "g", full=True).found] == [True]
    moved = table.set_column(table.schema.get_field_index("offset"), "offset", pa.array([512, 0, 2048]))
    rewrite(storage, path, moved)
    found = verify(storage, "g", full=True).found
    assert len(found) == 2 and all("(offset, size) is" in finding.what and finding.error for finding in found)
    assert storage.url.startswith("s3:") or verify(storage, "g").found == found, "on a disk positions are looked at always"


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
    rewrite(storage, path, shard_sha256="../../../../", shard="00000-../../../../.tar")
    assert "which is none" in verify(storage, "g").found[0].what
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
    """Of three tars without a sidecar only that whose number another one has is known to be of no use."""
    for name in ("g/00009-0123456789ab.tar", "g/00001-0123456789ab.tar", "g/train-0.tar"):
        storage.put(name, b"half")
    storage.put("g/shards.txt", b"\xff\xfe")
    findings = verify(storage, "g", full=True)
    assert findings.ok and {finding.path: (finding.again, finding.drop) for finding in findings.found} == {
        "g/00009-0123456789ab.tar": (True, ("g/00009-0123456789ab.tar",)), "g/00001-0123456789ab.tar": (False, ("g/00001-0123456789ab.tar",)),
        "g/train-0.tar": (False, ()), "g/shards.txt": (False, ()),
    }  # fmt: skip


def member(name: str = "a.png", kind: bytes = tarfile.REGTYPE, size: int = 0, form: int = tarfile.USTAR_FORMAT) -> bytes:
    about = tarfile.TarInfo(name)
    about.type, about.size, about.linkname = kind, size, "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return about.tobuf(form)


HOSTILE = {
    "a link": member(kind=tarfile.SYMTYPE),
    "a hard link": member(kind=tarfile.LNKTYPE),
    "a device": member(kind=tarfile.CHRTYPE),
    "an absolute name": member("/tmp/a.png"),
    "a name that leads out": member("../../a.png"),
    "a folder": member("a", kind=tarfile.DIRTYPE),
    "more than there is": member(size=7 << 30),
    "exabytes": member(size=1 << 62, form=tarfile.GNU_FORMAT),
    "a long name of gigabytes": member(kind=tarfile.GNUTYPE_LONGNAME, size=4 << 30),
    "attributes of gigabytes": member(kind=tarfile.XHDTYPE, size=4 << 30),
    "a compressed tar": gzip.compress(bytes(20_000)),
    "no end": member(),
    "something behind its end": bytes(1024) + b"#!/bin/sh" + bytes(503),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_tar_is_a_finding_and_is_not_believed(what, full, tmp_path, peak):
    storage = open_storage(tmp_path / "run")
    path = shard(storage, 0, WORDS)
    tar = first_tar(storage)
    storage.put(tar, HOSTILE[what])
    rewrite(storage, path, shard_bytes=str(len(HOSTILE[what])))
    most = peak()
    (finding,) = verify(storage, "g", full).found
    assert finding.error and f"{tar} is not a whole tar" in finding.what and most() < 50 << 20


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_memory_does_not_hang_on_the_size_of_a_shard(place, request, tmp_path, peak, figure):
    storage = open_storage(tmp_path / "run" if place == "disk" else request.getfixturevalue("bucket"))
    size = 320 << 20
    samples = [Sample(f"k{n}", {"png": bytes(size // 2)}) for n in range(2)]
    commit_shard(storage, "g", 0, "id", samples, pa.table({"word": ["a", "b"]}), {}, storage.work)
    del samples
    most = peak()
    assert verify(storage, "g", full=True).found == ()
    held = most()
    assert held < size // 2
    figure(f"{place}: {held / 1e6:.0f} MB at most in memory for a shard of {size / 1e6:.0f} MB, every byte read")

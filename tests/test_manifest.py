"""What the sidecars of a folder say together: only what was committed, every key once."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from shards import manifest
from shards.sample import Sample, sample_key
from shards.storage import Storage, open_storage
from shards.writer import commit_shard, write_tar


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(tmp_path / "run")


def shard(storage: Storage, number: int, words: str, identity: str = "id", folder: str = "g", **columns: list) -> str:
    samples = [Sample(sample_key(word.encode()), {"png": word.encode()}) for word in words.split()]
    table = pa.table({"word": words.split(), **columns})
    commit_shard(storage, folder, number, identity, samples, table, {}, storage.root.parent / "scratch")
    return manifest.sidecar_path(folder, number, identity)


def test_load_goes_by_number_and_adds_the_path(storage):
    for number, words in ((100_000, "e"), (11, "c d"), (2, "a b")):
        shard(storage, number, words)
    table = manifest.load(storage, "g")
    assert table["word"].to_pylist() == ["a", "b", "c", "d", "e"]
    assert table.column_names == [*manifest.SCHEMA.names, "word", "path"] and not table.schema.metadata
    for row in table.to_pylist():
        assert row["path"] == f"g/{row['shard']}" and storage.read(row["path"], row["offset"], row["size"]) == row["word"].encode()


def test_orphan_tars_and_foreign_files_are_never_seen(storage, tmp_path):
    shard(storage, 0, "a b")
    write_tar([Sample("k", {"png": b"orphan"})], tmp_path / "orphan.tar")
    storage.commit("g/00001-0123456789ab.tar", tmp_path / "orphan.tar")
    storage.put("g/rejects.parquet", b"not a sidecar")
    shard(storage, 1, "deeper", folder="g/sub")
    assert manifest.load(storage, "g")["word"].to_pylist() == ["a", "b"]
    committed = manifest.load(storage, "g")["shard"][0].as_py()
    assert manifest.write_shards_txt(storage, "g") == [committed] and storage.read("g/shards.txt").decode() == f"{committed}\n"


def test_the_root_is_a_folder_too(storage):
    shard(storage, 0, "a", folder="")
    table = manifest.load(storage, "")
    assert storage.exists(table["path"][0].as_py()) and manifest.sidecars(storage, "") == ["00000-id.parquet"]


def test_nothing_committed_is_an_empty_table(storage):
    table = manifest.load(storage, "g")
    assert table.num_rows == 0 and table.column_names == [*manifest.SCHEMA.names, "path"]


def test_one_number_under_two_identities_must_be_chosen(storage):
    old, new = shard(storage, 0, "a b", identity="old"), shard(storage, 0, "c d", identity="new")
    with pytest.raises(ValueError, match="2 identities: g/00000-new.parquet, g/00000-old.parquet"):
        manifest.load(storage, "g")
    with pytest.raises(ValueError, match="2 identities"):
        manifest.write_shards_txt(storage, "g")
    assert manifest.load(storage, "g", keep=lambda path: path.endswith("-new.parquet"))["word"].to_pylist() == ["c", "d"]
    assert manifest.load(storage, paths=[new, old])["word"].to_pylist() == ["c", "d", "a", "b"]
    assert len(manifest.write_shards_txt(storage, "g", keep=lambda path: path == old)) == 1


def test_a_key_in_two_shards_is_named_with_them(storage):
    shard(storage, 0, "a b")
    shard(storage, 1, "b c")
    with pytest.raises(ValueError) as error:
        manifest.load(storage, "g")
    assert sample_key(b"b") in str(error.value) and "g/00000-" in str(error.value) and "g/00001-" in str(error.value)
    assert sample_key(b"a") not in str(error.value)


def test_columns_of_one_folder_are_null_in_another(storage):
    real, made = shard(storage, 0, "a", folder="real", patient=["p1"]), shard(storage, 0, "b", folder="made", seed=[7])
    table = manifest.load(storage, paths=[real, made])
    assert table["patient"].to_pylist() == ["p1", None] and table["seed"].to_pylist() == [None, 7]
    wide = shard(storage, 1, "c", folder="made", seed=pa.array([8], pa.int32()), patient=pa.array(["p2"], pa.large_string()))
    assert manifest.load(storage, paths=[real, made, wide])["patient"].to_pylist() == ["p1", None, "p2"]


def test_folder_or_paths(storage):
    for arguments in ({}, {"folder": "g", "paths": []}):
        with pytest.raises(ValueError, match="either a folder or paths"):
            manifest.load(storage, **arguments)


def test_join_keeps_rows_and_order(storage):
    shard(storage, 0, "a b c")
    table = manifest.load(storage, "g")
    other = pa.table({"word": ["c", "x", "a", "b"], "index": [3.0, 0.0, 1.0, None]})
    joined = manifest.join(table, other, on="word")
    assert joined["word"].to_pylist() == ["a", "b", "c"] and joined["index"].to_pylist() == [1.0, None, 3.0]
    assert joined.column_names == [*table.column_names, "index"]
    pandas_text = other.set_column(0, "word", other["word"].cast(pa.large_string()))
    assert manifest.join(table, pandas_text, on="word").equals(joined)


def test_join_names_what_does_not_fit():
    table = pa.table({"key": ["a", "b", "c"], "fold": [0, 1, 2]})
    with pytest.raises(ValueError, match="more than once on the right, b$"):
        manifest.join(table, pa.table({"key": ["a", "b", "b", "c"]}))
    with pytest.raises(ValueError, match="2 of 3 values are missing on the right, b, c$"):
        manifest.join(table, pa.table({"key": ["a"], "v": [1]}))
    with pytest.raises(ValueError, match="the columns fold;"):
        manifest.join(table, table)


def test_a_flipped_bit_in_a_sidecar_is_not_read_as_data(storage):
    path = shard(storage, 0, " ".join(f"word{n}" for n in range(50)))
    whole, table = storage.read(path), manifest.read(storage, path)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    silent = []
    for place in range(4, footer, 7):
        storage.put("flipped", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            if not manifest.read(storage, "flipped").equals(table):
                silent.append(place)
        except ValueError as error:
            assert "flipped is damaged" in str(error)
    assert silent == []


def test_no_module_of_shards_knows_hearts_torch_or_jobs():
    text = "".join(file.read_text() for file in Path(manifest.__file__).parent.glob("*.py"))
    for module in ("torch", "jobs", "vhs", "webdataset"):
        assert f"import {module}" not in text and f"from {module}" not in text

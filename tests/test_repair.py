"""Every damage that a disk, a network or a person does is found by verify; repair undoes what can be undone, and names the rest."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from conftest import committed, vhs
from test_resume import assert_same

from jobs import audit, plan
from jobs.claim import Claim
from shards import manifest
from shards.storage import open_storage


def rewrite(storage, path, table=None, **about):
    old = manifest.read(storage, path)
    storage.put(path, manifest.encode(old if table is None else table, {**manifest.metadata(old), **about}))


def tar_cut(storage, tar, sidecar):
    storage.put(tar, storage.read(tar)[:-3000])


def byte_flipped(storage, tar, sidecar):
    data = bytearray(storage.read(tar))
    data[700] ^= 1
    storage.put(tar, bytes(data))


def tar_gone(storage, tar, sidecar):
    storage.delete(tar)


def sidecar_gone(storage, tar, sidecar):
    storage.delete(sidecar)


def sidecar_empty(storage, tar, sidecar):
    storage.put(sidecar, b"")


def sidecar_of_another(storage, tar, sidecar):
    rewrite(storage, sidecar, shard="00009-0123456789ab.tar")


def row_elsewhere(storage, tar, sidecar):
    table = manifest.read(storage, sidecar)
    moved = [offset + 512 for offset in table["offset"].to_pylist()]
    rewrite(storage, sidecar, table.set_column(table.column_names.index("offset"), "offset", [moved]))


def labels_of_fewer(storage, tar, sidecar):
    labels = next(name for name in storage.list(sidecar.rpartition("-")[0].replace("generated/", "labels/")) if name.endswith(".parquet"))
    table = manifest.read(storage, labels)
    rewrite(storage, labels, table.slice(1))


def model_gone(storage, tar, sidecar):
    storage.delete(next(name for name in storage.list("classifier/") if name.endswith("model.safetensors")))


def model_changed(storage, tar, sidecar):
    name = next(name for name in storage.list("classifier/") if name.endswith("model.safetensors"))
    data = storage.read(name)
    storage.put(name, data[:-1] + bytes([data[-1] ^ 1]))


def generator_gone(storage, tar, sidecar):
    storage.delete(next(name for name in storage.list("generator/") if name.count("/") == 1 and name.endswith(".json")))


def marker_empty(storage, tar, sidecar):
    storage.put(next(name for name in storage.list("labeller/") if name.count("/") == 1 and name.endswith(".json")), b"")


def round_half(storage, tar, sidecar):
    (name,) = storage.list("rounds/split/000")
    storage.put(name, storage.read(name)[:20])


MENDABLE = [
    tar_cut, byte_flipped, tar_gone, sidecar_gone, sidecar_empty, sidecar_of_another, row_elsewhere, labels_of_fewer, model_gone, model_changed,
    generator_gone, marker_empty, round_half,
]  # fmt: skip


@pytest.fixture
def run(reference, tmp_path) -> Path:
    shutil.copytree(reference, tmp_path / "run")
    return tmp_path / "run"


def shard_of(run: Path):
    storage = open_storage(run)
    sidecar = next(name for name in storage.list("generated/split/small/") if name.endswith(".parquet"))
    return storage, f"generated/split/small/{manifest.metadata(manifest.read(storage, sidecar))['shard']}", sidecar


@pytest.mark.parametrize("damage", MENDABLE)
def test_each_damage_is_found_and_what_is_wrong_goes(damage, run):
    assert audit.verify_all(str(run), full=True)[2] == []
    damage(*shard_of(run))
    found = [finding for finding in audit.verify_all(str(run), full=True)[2] if finding.error or damage is sidecar_gone]
    assert found and all(finding.path and finding.what and finding.to_do for finding in found)
    before = committed(run)
    would = audit.repair(str(run), full=True, dry_run=True)
    assert committed(run) == before and would.left == [] and (would.gone or would.again)
    did = audit.repair(str(run), full=True)
    assert (did.gone, did.left) == (would.gone, []) and before.keys() - committed(run).keys() == set(did.gone)


def test_what_nobody_can_make_again_is_named_and_kept(run, reference):
    storage, tar, sidecar = shard_of(run)
    (sources,) = storage.list("real/sources.json")
    storage.put(sources, b"[")
    with tarfile.open(fileobj=(hostile := io.BytesIO()), mode="w") as opened:
        link = tarfile.TarInfo("../../etc/passwd")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        opened.addfile(link)
    storage.put("generated/split/small/shards.txt", b"00000-nothing.tar\n")
    found = audit.repair(str(run), full=False)
    assert [finding.path for finding in found.left] == [sources] and "put it back" in found.left[0].to_do and found.gone == []
    assert found.rewritten == ["generated/split/small/shards.txt"]
    assert (run / "generated/split/small/shards.txt").read_bytes() == (reference / "generated/split/small/shards.txt").read_bytes()
    storage.put("plan.json", b"")
    storage.put(tar, hostile.getvalue())
    found = audit.repair(str(run), full=True)
    assert found.gone == [] and {"plan.json", sources, sidecar} <= {finding.path for finding in found.left}
    printed = vhs("repair", run, code=1)
    assert "put it back" in printed and "could not be mended" in printed and storage.exists(tar)


def test_a_folder_of_shards_loses_its_orphans_and_nothing_else(reference, tmp_path):
    shutil.copytree(reference / "generated" / "split" / "small", tmp_path / "shards")
    storage = open_storage(tmp_path / "shards")
    first, second = (name for name in storage.list() if name.endswith(".parquet"))
    orphan, cut = (manifest.metadata(manifest.read(storage, name))["shard"] for name in (first, second))
    storage.delete(first)
    storage.put(cut, storage.read(cut)[:1000])
    found = audit.repair(str(tmp_path / "shards"), full=False)
    assert found.gone == [orphan] and storage.exists(cut) and [finding.path for finding in found.left] == [second]


def test_nothing_is_repaired_under_those_at_work(run):
    storage, tar, sidecar = shard_of(run)
    tar_cut(storage, tar, sidecar)
    unit = plan.reopen(str(run)).units("generate")[0]
    with Claim.take(storage, unit.identity, heartbeat_s=1, stale_s=30):
        with pytest.raises(plan.PlanError, match="at work"):
            audit.repair(str(run), full=False)
    assert audit.repair(str(run), full=False).gone == [sidecar, tar]


def test_after_many_damages_the_same_command_makes_the_run_it_was(run, reference, figure):
    """As after a bad disk: a shard, a sidecar, labels, a model, a marker, a round."""
    for damage in (byte_flipped, labels_of_fewer, model_changed, marker_empty, round_half):
        damage(*shard_of(run))
    sidecar_gone(*[open_storage(run), None, next(name for name in open_storage(run).list("real/") if name.endswith(".parquet"))])
    printed = vhs("repair", run, "--full")
    assert " 0 that could not be mended" in printed
    left = len(committed(reference)) - len(committed(run))
    vhs("run", "debug/demo", "--out", run)
    assert left > 5 and json.loads((run / "plan.json").read_text())
    assert_same(run, reference, f"damaged and repaired, {left} files made anew", figure)
    assert " 0 errors" in vhs("verify", run, "--full")

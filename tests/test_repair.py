"""Every damage that a disk, a network or a person does is found by verify; repair undoes what can be undone, and names the rest."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from threading import Event, Thread

import pyarrow as pa
import pytest
from conftest import committed, vhs
from test_resume import assert_same

from jobs import audit, plan
from jobs.claim import FOLDER, Claim, beat_name, owner
from shards import manifest
from shards.posix import Posix
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


def test_a_folder_of_shards_loses_what_another_shard_replaced_and_nothing_else(reference, tmp_path):
    """Nobody can tell whether a whole tar without a sidecar is the only place of its images, nor make one again: such stay, a stranger's too."""
    shutil.copytree(reference / "generated" / "split" / "small", tmp_path / "shards")
    storage = open_storage(tmp_path / "shards")
    first, second = (name for name in storage.list() if name.endswith(".parquet"))
    alone, cut = (manifest.metadata(manifest.read(storage, name))["shard"] for name in (first, second))
    storage.put("00001-0123456789ab.tar", storage.read(cut))
    storage.put("train-000.tar", b"a stranger's")
    storage.delete(first)
    storage.put(cut, storage.read(cut)[:1000])
    found = audit.repair(str(tmp_path / "shards"), full=False)
    assert found.gone == ["00001-0123456789ab.tar"] and {finding.path for finding in found.left} == {alone, second}
    assert all(map(storage.exists, (alone, cut, "train-000.tar")))


def test_a_part_of_a_run_is_repaired_by_its_run_alone(run):
    with pytest.raises(plan.PlanError, match=f"vhs repair {run}$"):
        audit.repair(str(run / "generated" / "split" / "small"), full=False)


def test_a_persons_word_is_never_deleted(run):
    storage = open_storage(run)
    name = "labels/corrections/split/00000-0123456789ab.parquet"
    storage.put(name, manifest.encode(pa.table({"key": ["a"]}), {"facts": "{}"})[:-9])
    trained = next(name for name in storage.list("classifier/mixed/") if name.count("/") == 3 and name.endswith(".json"))
    marker = json.loads(storage.read(trained))
    marker["inputs"]["corrections"] = [[name, "0" * 64]]
    storage.put(trained, json.dumps(marker).encode())
    found = audit.repair(str(run), full=True)
    assert name in {finding.path for finding in found.left} and storage.exists(name) and name not in found.gone
    storage.put(trained, json.dumps(marker).encode())  # it was another than its readers knew, and went
    storage.delete(name)
    assert [finding.path for finding in audit.repair(str(run), full=False).left] == [name]
    confirmed = name.replace("corrections", "confirmed")
    storage.put(confirmed, b"PAR1")
    assert confirmed in {finding.path for finding in audit.repair(str(run), full=False).left} and storage.exists(confirmed)


def test_real_images_stay_while_their_films_are_away(real_data, tmp_path):
    """A shard with one damaged image holds others that are whole."""
    films, run = tmp_path / "films", tmp_path / "run"
    (films / "images").mkdir(parents=True)
    lines = (real_data / "ctr" / "labels.csv").read_text().splitlines()[:13]
    (films / "labels.csv").write_text("\n".join(lines))
    for line in lines[1:]:
        shutil.copy(real_data / "ctr" / "images" / line.partition(",")[0], films / "images")
    vhs("ingest", films, "--view", "human_frontal", "--out", run)
    storage = open_storage(run)
    tar = next(name for name in storage.list("real/") if name.endswith(".tar"))
    byte_flipped(storage, tar, None)
    (film,) = [source["file"] for source in json.loads(storage.read("real/sources.json")) if not source["reject"]][:1]
    (films / film).rename(tmp_path / "away")
    (found,) = [audit.repair(str(run), full=True)]
    assert found.gone == [] and all(film in finding.to_do for finding in found.left) and storage.exists(tar)
    (tmp_path / "away").rename(films / film)
    assert tar in audit.repair(str(run), full=True).gone


def test_what_a_kill_leaves_is_no_error_and_goes(run):
    storage = open_storage(run)
    marker = next(name for name in storage.list("generator/") if name.count("/") == 1)
    identity = marker.removesuffix(".json").rpartition("-")[2]
    product, shard = "classifier/mixed/split/seed-0/0123456789ab/model.safetensors", "generated/split/small/00000-0123456789ab.tar"
    left = [f"checkpoints/{identity}/00000004.pt", product, shard]
    for name in left:
        storage.put(name, b"half")
    findings = audit.verify_all(str(run), full=True)[2]
    assert len(findings) == 3 and not any(finding.error for finding in findings)
    assert sorted(audit.repair(str(run), full=False).gone) == sorted(left) and audit.verify_all(str(run), full=True)[2] == []


def test_a_power_cut_that_emptied_files_costs_no_more_than_their_units(run):
    """Found without reading every byte. The word on how the run was started is bookkeeping: the same command writes it again."""
    storage = open_storage(run)
    model = next(name for name in storage.list("classifier/") if name.endswith("model.safetensors"))
    settings = next(name for name in storage.list("labeller/") if name.endswith("config.json"))
    for name in (model, settings, "state/execution.json"):
        storage.put(name, b"")
    found = audit.repair(str(run), full=False)
    assert {model, settings} < set(found.gone) and sum(name.endswith(".json") for name in found.gone) == 3 and found.left == []
    assert plan.started(storage) == {}


def test_nothing_is_repaired_under_those_at_work(run):
    storage, tar, sidecar = shard_of(run)
    tar_cut(storage, tar, sidecar)
    unit = plan.reopen(str(run)).units("generate")[0]
    with Claim.take(storage, unit.identity, heartbeat_s=1, stale_s=30):
        with pytest.raises(plan.PlanError, match="at work"):
            audit.repair(str(run), full=False)
    assert audit.repair(str(run), full=False).gone == [sidecar, tar]


@pytest.mark.parametrize("alive", [True, False])
def test_another_machine_is_at_work_if_its_heart_beats_whatever_its_clock_says(run, alive):
    storage, tar, sidecar = shard_of(run)
    tar_cut(storage, tar, sidecar)
    settings = json.loads(storage.read("state/execution.json"))
    storage.put("state/execution.json", json.dumps({**settings, "execution": {**settings["execution"], "stale_s": 2.0, "heartbeat_s": 0.2}}).encode())
    unit, over = plan.reopen(str(run)).units("generate")[0], Event()
    storage.commit(f"{FOLDER}{unit.identity}-0000.json", json.dumps({**owner(), "machine": "elsewhere", "began_s": 0.0}).encode())

    def beat():
        count = 0
        while not over.wait(0.3) and alive:
            count += 1
            storage.put(beat_name(unit.identity, 0), json.dumps({"count": count, "when_s": 0.0}).encode())

    heart = Thread(target=beat)
    heart.start()
    try:
        if alive:
            with pytest.raises(plan.PlanError, match="at work"):
                audit.repair(str(run), full=False)
        else:
            assert audit.repair(str(run), full=False).gone == [sidecar, tar]
    finally:
        over.set()
        heart.join()


def test_what_cannot_be_read_now_is_named_and_nothing_is_deleted_for_it(run, monkeypatch):
    """A disk or a server that fails at one tar, one table and one model: the others are looked at, and repair leaves them."""
    storage, tar, sidecar = shard_of(run)
    model = next(name for name in storage.list("classifier/") if name.endswith("model.safetensors"))
    labels = next(name for name in storage.list("labels/") if name.endswith(".parquet"))
    bad, opened, read = {tar, model, labels}, Posix.stream, Posix.read

    def failing(real):
        def call(self, path, *arguments):
            if path in bad:
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            return real(self, path, *arguments)

        return call

    monkeypatch.setattr(Posix, "stream", failing(opened))
    monkeypatch.setattr(Posix, "read", failing(read))
    shards, _, findings = audit.verify_all(str(run), full=True)
    assert {finding.path for finding in findings if finding.error} == bad and all("Input/output error" in finding.what for finding in findings)
    repaired = audit.repair(str(run), full=True)
    assert repaired.gone == repaired.again == [] and {finding.path for finding in repaired.left} == bad and shards > 1


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

"""Exports hold exactly the images that were asked for, byte for byte, and the programs that they are for read them."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, committed, vhs

from jobs import plan
from jobs.export import export_run
from shards import export, manifest
from shards.reader import DamagedShard
from shards.storage import open_storage

CLASSES = ["small", "normal", "large"]

MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from shards import export, manifest
from shards.reader import ShardReader
from shards.sample import Sample
from shards.storage import open_storage
from shards.writer import commit_shard
root, layout = Path(sys.argv[1]), sys.argv[2]
storage, noise = open_storage(root / "run"), np.random.default_rng(0)
for n in range(8):
    samples = (Sample(f"k{n}-{i}", {"png": noise.bytes(1 << 20)}) for i in range(40))
    commit_shard(storage, "g", n, "id", samples, pa.table({"i": list(range(40))}), {}, root)
table = manifest.load(storage, "g")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
about = pa.table({"split": ["train"] * len(table), "class": ["small"] * len(table)})
out = open_storage(root / "out")
export.export(export.Dataset(ShardReader(storage, table), about, ("small",)), layout, out, out.work)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.fixture(scope="module")
def images(reference) -> dict[str, str]:
    """key -> sha256 of every image of the run but class images, as the sidecars have it."""
    storage = open_storage(reference)
    sidecars = [name for name in storage.list() if name.startswith(("real/", "generated/")) and name.endswith(".parquet")]
    table = manifest.load(storage, paths=sidecars)
    return dict(zip(table["key"].to_pylist(), table["sha256"].to_pylist(), strict=True))


def webdataset_of(out: Path) -> list[dict]:
    """What plain webdataset reads: every sample's json, with its image's bytes."""
    import webdataset

    tars = [str(out / name) for name in (out / "shards.txt").read_text().split()]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert all(sample["__key__"] == json.loads(sample["json"])["key"] for sample in samples)
    return [json.loads(sample["json"]) | {"bytes": sample["png"]} for sample in samples]


def imagefolder_of(out: Path) -> list[dict]:
    """What torchvision reads, and the table beside."""
    from torchvision.datasets import ImageFolder

    found = []
    for split in ("train", "valid", "test"):
        said = {row["file_name"]: row for row in pq.read_table(out / split / "metadata.parquet").to_pylist()}
        folder = ImageFolder(str(out / split), loader=lambda file: Path(file).read_bytes())
        files = [Path(file) for file, _ in folder.samples]
        assert {file.relative_to(out / split).as_posix() for file in files} == said.keys()
        for file, (data, label) in zip(files, folder, strict=True):
            row = said[file.relative_to(out / split).as_posix()]
            assert folder.classes[label] == row["class"] and row["split"] == split and file.stem == row["key"]
            found.append(row | {"bytes": data})
    return found


def parquet_of(out: Path) -> list[dict]:
    """What Hugging Face datasets reads."""
    import datasets

    found, of_split = [], datasets.load_dataset(str(out), cache_dir=str(out.parent / "cache"))
    for split, rows in of_split.items():
        assert rows.features["label"].names == CLASSES
        for row in rows.cast_column("image", datasets.Image(decode=False)):
            found.append(row | {"split": split, "class": CLASSES[row["label"]], "bytes": row["image"]["bytes"]})
        assert rows[0]["image"].mode == "L" and rows[0]["image"].size == (128, 128)
    return found


READ = {"webdataset": webdataset_of, "imagefolder": imagefolder_of, "parquet": parquet_of}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize("layout", READ)
def test_the_programs_it_is_for_read_what_the_run_trained_and_judged_on(layout, reference, images, tmp_path):
    vhs("export", reference, "--format", layout, "--out", tmp_path / "out")
    rows = READ[layout](tmp_path / "out")
    assert all(hashlib.sha256(row["bytes"]).hexdigest() == images[row["key"]] for row in rows) and len({row["key"] for row in rows}) == len(rows)
    (mixed,) = [json.loads(file.read_text())["facts"] for file in reference.glob("classifier/mixed/split/*.json")]
    train = [row for row in rows if row["split"] == "train"]
    assert sum(row["generated"] for row in train) == mixed["generated"] and sum(not row["generated"] for row in train) == mixed["real"]
    answers = list(csv.reader((reference / "report" / "predictions" / "real.csv").open()))
    assert len(answers) == sum(row["split"] == "test" for row in rows)
    assert all(row["verdict"] == "accepted" and row["prompt"] and row["split"] == "train" for row in rows if row["generated"])
    assert all(row["file"] and row["patient"] and row["verdict"] is None for row in rows if not row["generated"])
    held_out, taught = ({row["patient"] for row in rows if row["split"] == split and row["patient"]} for split in ("test", "train"))
    assert held_out and taught and not held_out & taught


def test_all_layouts_say_the_same_of_the_same_images(reference, tmp_path):
    said = []
    for layout, read in READ.items():
        export_run(str(reference), layout, str(tmp_path / layout / "out"), "all", "split")
        rows = read(tmp_path / layout / "out")
        said.append({row["key"]: [row[name] for name in ("split", "class", "generated", "index", "points", "verdict", "seed", "bytes")] for row in rows})
    assert said[0] == said[1] == said[2] and len({len(values) for values in said}) == 1
    refused = {row[5] for row in said[0].values()} - {None, "accepted"}
    assert refused, "no image was refused, so nothing is shown of them"


def test_points_lie_on_the_image_that_is_exported(reference, tmp_path):
    from vhs.measure import VIEWS

    export_run(str(reference), "webdataset", str(tmp_path / "out"), "accepted", "split")
    rows = webdataset_of(tmp_path / "out")
    view = VIEWS["canine_lateral"]
    for row in rows:
        points = pa.array(row["points"]).flatten().to_numpy().reshape(-1, 2)
        assert (points > -0.5).all() and (points < 127.5).all()
        assert float(view.measure(points)) == pytest.approx(row["index"], rel=1e-4)


def test_an_export_can_be_ingested(reference, tmp_path):
    export_run(str(reference), "webdataset", str(tmp_path / "out"), "accepted", "split")
    vhs("ingest", tmp_path / "out", "--view", "canine_lateral", "--out", tmp_path / "read")
    storage = open_storage(tmp_path / "read")
    table = manifest.load(storage, "real").to_pandas()
    rows = {f"{row['key']}.png": row for row in webdataset_of(tmp_path / "out")}
    assert json.loads(storage.read("real/rejects.json")) == [] and len(table) == len(rows)
    assert all(CLASSES[label] == rows[origin]["class"] for label, origin in zip(table.label, table.origin, strict=True))


@pytest.mark.parametrize("layout", READ)
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_killed_and_begun_again_it_is_what_it_would_have_been(layout, place, request, reference, tmp_path, monkeypatch, figure):
    monkeypatch.setattr(export, "PIECE", (10, 1 << 28))
    out = str(tmp_path / "out") if place == "disk" else request.getfixturevalue("bucket")
    _, whole = export_run(str(reference), layout, str(tmp_path / "undisturbed"), "accepted", "split")
    script = "import sys; from shards import export; export.PIECE = (10, 1 << 28); from jobs.export import export_run; export_run(*sys.argv[1:])"
    arguments = [sys.executable, "-c", script, str(reference), layout, out, "accepted", "split"]
    killed = subprocess.run(arguments, cwd=ROOT, env={**os.environ, "VHS_CRASH_AT": "name-made:5"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    _, written = export_run(str(reference), layout, out, "accepted", "split")
    assert 0 < written < whole and committed(out) == committed(tmp_path / "undisturbed")
    assert export_run(str(reference), layout, out, "accepted", "split")[1] == 0
    figure(f"{layout}, {place}: killed, then {written} of {whole} files to write, all {len(committed(out))} equal")


def test_what_is_not_this_export_is_refused(reference, tmp_path):
    export_run(str(reference), "webdataset", str(tmp_path / "out"), "real", "split")
    for layout, what in (("webdataset", "accepted"), ("parquet", "real")):
        with pytest.raises(ValueError, match="holds another export"):
            export_run(str(reference), layout, str(tmp_path / "out"), what, "split")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "letter.txt first" in vhs("export", reference, "--out", tmp_path / "mine", code=1)
    assert "legal are webdataset, imagefolder, parquet" in " ".join(vhs("export", reference, "--format", "tfrecord", "--out", tmp_path / "x", code=1).split())
    with pytest.raises(plan.PlanError, match="its scopes are split"):
        export_run(str(reference), "webdataset", str(tmp_path / "y"), "real", "fold-0")
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_run_that_has_not_come_so_far_says_so_and_a_damaged_image_ends_it(reference, tmp_path):
    shutil.copytree(reference, run := tmp_path / "run")
    next(run.glob("labels/split/small/*.parquet")).unlink()
    with pytest.raises(plan.PlanError, match=f"vhs stage label {run}"):
        export_run(str(run), "webdataset", str(tmp_path / "out"), "accepted", "split")
    tar = next(run.glob("real/*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamagedShard, match=tar.name):
        export_run(str(run), "webdataset", str(tmp_path / "out"), "real", "split")
    assert "shards.txt" not in open_storage(tmp_path / "out").list()


@pytest.mark.parametrize("layout", READ)
def test_memory_does_not_hang_on_the_number_of_images(layout, tmp_path, figure):
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path), layout], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    grown_mb = int(done.stdout) * 1024 / 1e6
    assert grown_mb < 336 / 2
    figure(f"{layout}: {grown_mb:.0f} MB more in memory to export 336 MB")

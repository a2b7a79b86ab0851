"""The benches say what they should of each contender; times are the machine's business."""

from __future__ import annotations

import json

import pytest
from conftest import vhs
from test_chain import on
from test_slurm_scripts import submit

from shards.storage import open_storage


def test_write_compares_bytes_and_rates(tmp_path):
    printed = vhs("bench", "write", "--images", 4, "--repeats", 1, "--size", 64, "--json", tmp_path / "write.json")
    result = json.loads((tmp_path / "write.json").read_text())
    ours, colour, grey = result["rows"]
    assert result["unit"] == "images per core-second" in printed and ours["name"].startswith("vhs") and ours["ratio"] == 1
    assert all(row["rate"] > 0 and row["ratio"] == pytest.approx(row["rate"] / ours["rate"]) for row in result["rows"])
    assert grey["bytes_per_image"] < colour["bytes_per_image"]


@pytest.mark.slow
def test_generate_has_the_same_work_done_by_each(tmp_path):
    options = ("--images", 2, "--repeats", 1, "--batch", 2, "--steps", 2, "--size", 32, "--device", "cpu")
    vhs("bench", "generate", *options, "--json", tmp_path / "generate.json")
    result = json.loads((tmp_path / "generate.json").read_text())
    assert [row["name"].split(":")[0].split(" ")[0] for row in result["rows"]] == ["vhs", "diffusers", "diffusers", "diffusers", "UNet"]
    assert all(row["rate"] > 0 for row in result["rows"]) and result["device"]


def test_dispatch_counts_what_it_says(tmp_path):
    printed = vhs("bench", "dispatch", "--units", 5, "--repeats", 1, "--shards", 30, "--json", tmp_path / "dispatch.json")
    result = json.loads((tmp_path / "dispatch.json").read_text())
    assert [row["name"].split(":")[0] for row in result["bookkeeping"]["rows"]] == ["vhs", "submitit", "Ray"]
    assert all(row["rate"] > 0 for row in result["bookkeeping"]["rows"])
    restart, submission = result["timings"]
    assert restart["seconds"] > 0 and "over 30 shards" in restart["what"] and "3 units of label left" in restart["note"] and restart["what"] in printed
    assert "5 units" in submission["what"]


def scaled(folder, backend: str):
    """What the bench wrote of one and of two workers."""
    one, two = json.loads((folder / "scaling.json").read_text())
    assert (one["workers"], two["workers"], one["efficiency"]) == (1, 2, 1) and one["backend"] == two["backend"] == backend
    assert two["efficiency"] == pytest.approx(one["wall_s"] / two["wall_s"])
    assert all(row["wall_s"] >= 2 * row["seconds"] and row["start_s"] > 0 for row in (one, two)), "two units a worker, one after the other"


def test_scaling_is_of_units_that_sleep_in_an_array(cluster, tmp_path):
    options = ("--workers", "1,2", "--seconds", 0.5, "--out", tmp_path / "runs", "--json", tmp_path / "scaling.json")
    on(cluster, "bench", "scaling", "--on", "slurm", "--cluster", "testcluster", *options)
    scaled(tmp_path, "slurm")


@pytest.mark.slow
def test_scaling_is_of_units_that_sleep_on_ray(cluster, tmp_path):
    options = ("--workers", "1,2", "--seconds", "0.5", "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "scaling.json"))
    submit(cluster, tmp_path, "ray.sbatch", "vhs", "bench", "scaling", "--on", "ray", *options, stage="generate", options="--nodes=2")
    scaled(tmp_path, "ray")


def test_stream_reads_all_of_it_from_either_place(bucket, tmp_path):
    """mosaicml-streaming is no dependency: its row has a rate or says what to install."""
    options = ("--url", bucket, "--images", 70, "--repeats", 1, "--size", 64)
    printed = vhs("bench", "stream", *options, "--json", tmp_path / "stream.json")
    result = json.loads((tmp_path / "stream.json").read_text())
    *rows, last = result["rows"]
    assert [row["name"].split(":")[0] for row in rows] == 3 * ["vhs"] + 3 * ["webdataset"] and last["name"].startswith("mosaicml")
    assert all(row["rate"] > 0 and row["ratio"] == pytest.approx(row["rate"] / rows[0]["rate"]) for row in rows)
    assert last["rate"] or "pip install --no-deps mosaicml-streaming" in last["note"] and "pip" in printed
    assert open_storage(bucket).list() == [], "what was written there is gone"

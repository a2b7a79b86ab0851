"""A finished run: plain libraries open it, and it can be verified, drawn again and asked about."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import markers, vhs

from jobs.plan import reopen
from shards import manifest
from shards.storage import open_storage


def _generated(reference) -> pd.DataFrame:
    run = reopen(str(reference))
    return manifest.load(run.storage, paths=run.committed("generate")).to_pandas()


def test_summary_has_the_documented_keys(reference):
    summary = json.loads((reference / "report" / "summary.json").read_text())
    assert set(summary) == {
        "purpose", "corrected", "patients_known", "unlabelled", "arms", "paired", "differences", "labeller", "generated", "generators", "likeness"
    }  # fmt: skip
    assert {"real", "real-matched", "mixed", "measure"} <= set(summary["arms"])
    for arm in summary["arms"].values():
        low, high = arm["test"]["ci95"]
        assert set(arm) == {"test", "validation", "cv", "seeds"} and 0 <= low <= arm["test"]["accuracy"] <= high <= 1 and arm["cv"] is None
    assert summary["paired"]["arms"] == ["mixed", "real-matched"] and summary["paired"]["from"] == "test"
    assert summary["paired"]["difference"] == pytest.approx(
        summary["arms"]["mixed"]["test"]["accuracy"] - summary["arms"]["real-matched"]["test"]["accuracy"]
    )
    assert set(summary["labeller"]) == {"class_accuracy", "index_mae", "bias", "limits", "spread_rank"}
    assert summary["generated"]["asked"] == 3 * 12 and summary["generated"]["produced"] == len(_generated(reference))
    assert summary["likeness"]["features"] == "labeller features" and 0 <= summary["likeness"]["probe"]["auroc"] <= 1
    assert "research use" in (reference / "report" / "index.html").read_text().lower()


def test_every_arm_has_an_evaluators_file_of_every_test_image(reference):
    run = reopen(str(reference))
    predictions = pd.concat([manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate")])
    held_out = predictions[predictions.role == "held-out"]
    for arm, rows in held_out.groupby("arm"):
        lines = (reference / "report" / "predictions" / f"{arm}.csv").read_bytes().decode().removesuffix("\r\n").split("\r\n")
        answers = dict(line.split(",") for line in lines)
        assert list(answers) == sorted(rows.origin) and len(lines) == len(rows)
        for row in rows.itertuples():  # one seed: its own answer, large 0, normal 1, small 2
            assert answers[row.origin] == (f"{row.measured:.4f}" if arm == "measure" else str(2 - row.predicted))


def test_webdataset_reads_the_shards_that_shards_txt_names(reference):
    import webdataset

    read = {}
    for listing in sorted(reference.glob("generated/split/*/shards.txt")):
        names = [str(listing.parent / name) for name in listing.read_text().split()]
        read |= {sample["__key__"]: sample["png"] for sample in webdataset.WebDataset(names, shardshuffle=False, empty_check=False)}
    rows = _generated(reference)
    assert set(read) == set(rows.key) and len(rows) > 0
    assert all(data.startswith(b"\x89PNG") for data in read.values())


def test_pandas_reads_the_manifest(reference):
    (first, *_) = sorted(reference.glob("generated/split/small/*.parquet"))
    table = pd.read_parquet(first)
    assert {
        "key",
        "file",
        "shard",
        "offset",
        "size",
        "sha256",
        "prompt",
        "prompted",
        "seed",
        "number",
        "generator",
        "generated_for",
    } <= set(table.columns)
    assert set(table.prompted) == {"small"} and table.number.tolist() == list(range(len(table)))


def test_diffusers_opens_a_generator_folder(reference):
    from diffusers import StableDiffusionPipeline

    run = reopen(str(reference))
    folder = reference / run.marker(run.committed("dreambooth")[0]).folder
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("photo of sks small dog heart", height=64, width=64, num_inference_steps=2).images[0]
    assert image.size == (64, 64)


def test_timm_loads_a_classifier(reference):
    import timm
    from safetensors.torch import load_file
    from torch import nn

    run = reopen(str(reference))
    folder = reference / run.marker(run.committed("train", arm="mixed")[0]).folder
    settings = json.loads((folder / "config.json").read_text())
    model = timm.create_model(settings["model"], in_chans=1, num_classes=3)
    model.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 3))  # head_hidden = 1, as the study writes it
    assert model.load_state_dict(load_file(folder / "model.safetensors")).missing_keys == []


def test_real_and_generated_images_are_stored_alike(reference):
    from vhs.radiograph import decode_png

    run = reopen(str(reference))
    kinds = {}
    for stage in ("ingest", "generate"):
        rows = manifest.load(run.storage, paths=run.committed(stage)).to_pandas()
        data = [run.storage.read(row.path, row.offset, row.size) for row in rows.itertuples()]
        kinds[stage] = {
            (decode_png(item).shape, decode_png(item).dtype, item[:33]) for item in data
        }  # PNG signature and header: size, depth, colour, filter
    assert len(kinds["ingest"]) == 1 and kinds["ingest"] == kinds["generate"]


def test_verify_is_content_then_names_what_is_damaged(reference, tmp_path):
    assert "0 errors" in vhs("verify", reference, "--full")
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    tar = next(run.glob("generated/split/large/*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1  # of the first image, not of a header
    tar.write_bytes(data)
    weights = next(run.glob("classifier/mixed/split/seed-0/*/model.safetensors"))
    weights.unlink()
    labels = next(run.glob("labels/split/small/*.parquet"))  # a whole table, but another one
    storage, name = open_storage(run), labels.relative_to(run).as_posix()
    table = manifest.read(storage, name)
    storage.put(name, manifest.encode(table.slice(0, table.num_rows - 1), manifest.metadata(table)))
    printed = " ".join(vhs("verify", run, "--full", code=1).split())
    assert tar.name in printed and "sha256" in printed and "model.safetensors: missing" in printed
    assert f"{name}: not what" in printed


def test_a_folder_of_shards_is_a_dataset(reference):
    assert "0 errors" in vhs("verify", reference / "real")
    assert "neither a run" in vhs("verify", reference / "rounds", code=1)


def test_regenerate_gives_the_same_bytes(reference):
    rows = _generated(reference)
    key = rows[(rows.prompted == "normal") & (rows.number == 11)].key.item()  # in the second unit, inside a batch
    printed = " ".join(vhs("regenerate", reference, key).split())
    assert "the same bytes" in printed and "image 11 of generated/split/normal/00001" in printed
    assert "no generated image" in vhs("regenerate", reference, "0" * 16, code=1)


def test_image_number_i_does_not_depend_on_rounds_or_units(reference):
    from jobs.stages import generate

    run = reopen(str(reference))
    rows = _generated(reference).sort_values(["prompted", "number"])
    again = [
        (w.number, w.seed)
        for name in sorted(set(rows.prompted))
        for n in (0, 1)
        for w in generate.wanted(run.config, {"scope": "split", "class": name, "number": n})
    ]
    assert list(zip(rows.number, rows.seed)) == again and rows.seed.is_unique


def test_status_counts_every_unit(reference):
    from jobs.stages import STAGES

    counts = re.findall(r"(\d+) of (\d+)", vhs("status", reference).split("generated for")[0])
    assert len(counts) == len(STAGES) and all(done == total for done, total in counts)
    assert sum(int(done) for done, _ in counts) == len(markers(reference))


def test_what_every_stage_cost_is_said(reference):
    from jobs.status import costs, per_accepted

    run = reopen(str(reference), read_only=True)
    spent = {cost.stage: cost for cost in costs(run)}
    assert sum(cost.units for cost in spent.values()) == len(markers(reference))
    assert all(cost.core_seconds > 0 and cost.seconds > 0 and 0.05 < cost.peak_gb < 8 for cost in spent.values() if cost.stage != "split")
    accepted = json.loads((reference / "report" / "summary.json").read_text())["generated"]["accepted"]
    assert per_accepted(run) == pytest.approx((spent["generate"].core_seconds + spent["label"].core_seconds) / accepted)
    printed = vhs("status", reference)
    assert "core-seconds" in printed and f"{spent['dreambooth'].core_seconds:.1f}" in printed and "an accepted image cost" in printed


def test_a_stage_alone_stops_after_it(tmp_path):
    run = tmp_path / "run"
    vhs("run", "debug/demo", "--out", run, environment={"VHS_CRASH_AT": "training-step:1"}, code=-9)
    vhs("stage", "split", run)
    assert {json.loads(file.read_text())["stage"] for file in (run / "state" / "done").iterdir()} == {"ingest", "split"}
    assert "no stage" in vhs("stage", "splitt", run, code=1)


def test_generation_alone_goes_through_its_rounds(tmp_path, reference):
    run = tmp_path / "run"
    vhs("run", "debug/demo", "--out", run, environment={"VHS_CRASH_AT": "round-before-commit:1"}, code=-9)
    vhs("stage", "generate", run)
    assert len(list(run.glob("rounds/split/*.json"))) == len(list(reference.glob("rounds/split/*.json"))) == 2
    assert not list(run.glob("classifier/*/split/*.json"))
    printed = " ".join(vhs("report", run, code=1).split())
    assert "is not finished" in printed and "units of train" in printed


def test_a_labeller_of_another_run_brings_its_lineage(reference, tmp_path):
    """A labeller that another run fine-tuned has seen that run's patients; the guard hears of it."""
    run = reopen(str(reference))
    folder = reference / run.marker(run.committed("labeller")[0]).folder
    began = tmp_path / "run"
    vhs("run", "debug/demo", f"labeller.init={folder}", "split.seed=5", "--out", began, code=1)
    failures = " ".join(file.read_text() for file in (began / "state" / "failures").iterdir())
    assert "LeakError" in failures and "labeller" in failures and "held-out patient" in failures


def test_an_unusable_folder_says_so(tmp_path):
    assert "is not a run" in " ".join(vhs("status", tmp_path, code=1).split())
    assert "does not exist" in vhs("run", "debug/ctr", "data=nowhere", "--out", tmp_path / "run", code=1)


def test_measured_points_are_those_of_the_labeller(reference):
    """A labels table can be made again from its shard: same points, index and spread."""
    from jobs import batches
    from vhs.labelling import Labeller

    run = reopen(str(reference))
    shard, labels = run.committed("generate")[0], run.committed("label")[0]
    rows, table = manifest.load(run.storage, paths=[shard]).to_pandas(), manifest.read(run.storage, labels).to_pandas()
    labeller = Labeller.load(open_storage(reference).local(run.marker(run.committed("labeller")[0]).folder))
    again = labeller.measure(batches.load_images(run.storage, rows), rows.key.tolist(), passes=run.config.labeller.passes)
    np.testing.assert_allclose(again.index, table["index"], rtol=1e-4)
    np.testing.assert_allclose(again.spread, table["spread"], rtol=1e-2, atol=1e-3)

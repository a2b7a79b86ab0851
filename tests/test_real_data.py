"""Real radiographs: the whole pipeline on human chest films, and measurements of dogs from PNG, JPEG and 12-bit DICOM."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import markers, vhs

from jobs.plan import reopen
from shards import manifest


@pytest.fixture(scope="module")
def chest_run(real_data, tmp_path_factory):
    run = tmp_path_factory.mktemp("ctr") / "run"
    vhs("run", "debug/ctr", f"data={real_data / 'ctr'}", "--out", run)
    return run


def test_every_stage_ran_and_each_arm_is_reported_per_source(chest_run, figure):
    run = reopen(str(chest_run))
    from jobs.stages import STAGES

    assert all(map(run.done, (unit for stage in STAGES for unit in run.units(stage.NAME))))
    assert {stage.NAME for stage in STAGES if not run.units(stage.NAME)} == {"prompts"}, "no prompts to choose from were given"
    predictions = pd.concat([manifest.read(run.storage, path).to_pandas() for path in run.committed("evaluate")])
    counts = predictions.groupby(["arm", "source"]).key.nunique().unstack()
    figure(f"images predicted: {counts.to_dict('index')}")
    assert set(counts.index) == {"real", "real-matched", "mixed", "measure"} and set(counts.columns) == {"jsrt", "wingspan"}
    assert (counts.sum(axis=1) == counts.sum(axis=1).iloc[0]).all() and counts.sum(axis=1).iloc[0] > 80
    page = (chest_run / "report" / "index.html").read_text()
    assert "jsrt" in page and "wingspan" in page


def test_every_radiograph_is_in_with_its_own_points(chest_run, real_data):
    """All 401, classes as the table's ratio says, and the stored points give the table's ratio back: nothing was squashed."""
    run = reopen(str(chest_run))
    rows = manifest.load(run.storage, paths=run.committed("ingest")).to_pandas().set_index("origin")
    table = pd.read_csv(real_data / "ctr" / "labels.csv").set_index("file")
    assert set(rows.index) == set(table.index) and len(rows) == 401
    np.testing.assert_allclose(rows["index"].reindex(table.index), table.ctr, atol=6e-5)
    expected = np.where(table.ctr < 0.42, 0, np.where(table.ctr > 0.50, 2, 1))
    assert (rows.label.reindex(table.index).to_numpy() == expected).mean() > 0.99  # the table rounds to four decimals
    assert rows.patient.reindex(table.index).tolist() == table.patient.tolist()


def test_predict_measures_every_dog(real_data, tmp_path):
    files = sorted((real_data / "dogs").iterdir())
    assert {file.suffix for file in files} == {".png", ".jpg", ".dcm"}
    out, pictures = tmp_path / "predictions.csv", tmp_path / "overlays"
    vhs("predict", "canine_lateral", *files, "--out", out, "--overlay", pictures)
    rows = list(csv.DictReader(out.open()))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row in rows:
        points = np.array([[float(row[f"{name}_{axis}"]) for axis in "xy"] for name in "ABCDEF"])
        ab, cd, ef = (np.linalg.norm(points[i] - points[i + 1]) for i in (0, 2, 4))
        assert float(row["VHS"]) == pytest.approx(6 * (ab + cd) / ef, rel=0.02), "points are in the file's own pixels"
        assert row["class"] in ("small", "normal", "large") and float(row["spread"]) >= 0
        assert (pictures / f"{row['file'].rpartition('/')[2]}.png").read_bytes().startswith(b"\x89PNG")


def test_bad_files_are_rejected_by_name_and_the_rest_is_used(real_data, tmp_path):
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    lines = (real_data / "ctr" / "labels.csv").read_text().splitlines()[:31]
    for line in lines[1:]:
        name = line.split(",")[0]
        shutil.copy(real_data / "ctr" / "images" / name, data / "images" / name)
    torn, copied, outside, gone = (line.split(",")[0] for line in lines[1:5])
    (data / "images" / torn).write_bytes((data / "images" / torn).read_bytes()[:2000])
    shutil.copy(data / "images" / outside, data / "images" / copied)
    (data / "images" / gone).unlink()
    fields = lines[5].split(",")
    lines[5] = ",".join([*fields[:3], "5000", *fields[4:]])
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    run = tmp_path / "run"
    printed = " ".join(vhs("ingest", data, "--view", "human_frontal", "--out", run).split())
    rejects = {item["file"].rpartition("/")[2]: item["reason"] for item in json.loads((run / "real" / "rejects.json").read_text())}
    assert (
        set(rejects) == {torn, outside, gone, fields[0]}
        and "the same bytes" in rejects[outside]
        and "outside the image" in rejects[fields[0]]
    )
    assert all(name in printed for name in rejects)
    rows = manifest.load(reopen(str(run)).storage, "real").to_pandas()
    assert len(rows) == 26 and len(markers(run)) == 1

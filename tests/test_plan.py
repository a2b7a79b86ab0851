"""Science is frozen at the first start, execution is free; a finished unit is reused where it is the same work."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import committed, markers, vhs

from jobs.bench.dispatch import commit_nothing, fill
from jobs.drive import frontier
from jobs.plan import invalidated


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        (["classifier.epochs"], ["train", "evaluate", "report"]),
        (["generation.guidance"], ["generate", "label", "train", "evaluate", "report"]),
        (["generation.quota"], ["train", "evaluate", "report"]),
        (["labeller.steps"], ["labeller", "label", "train", "evaluate", "report"]),
        (["dreambooth.steps"], ["dreambooth", "generate", "label", "train", "evaluate", "report"]),
        (["data"], ["ingest", "split", "labeller", "dreambooth", "generate", "label", "train", "evaluate", "report"]),
        (["seeds"], ["report"]),
    ],
)
def test_a_change_invalidates_what_reads_it_and_what_follows(keys, stages):
    assert invalidated(keys) == stages


def test_an_execution_key_may_change(reference, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(reference, run)
    for marker in [name for name in markers(run) if name.startswith(("predictions/", "report"))]:
        (run / marker).unlink()
    printed = vhs("run", "debug/demo", "execution.checkpoint_steps=3", "execution.workers=2", "--out", run)
    assert "evaluate: " in printed and "train: " not in printed
    assert committed(run) == committed(reference)


def test_a_science_key_is_refused_by_name_with_its_stages(reference):
    before = committed(reference)
    printed = vhs("run", "debug/demo", "classifier.epochs=4", "dreambooth.steps=11", "--out", reference, code=1)
    for word in (
        "classifier.epochs",
        "dreambooth.steps",
        "dreambooth, generate, label, train, evaluate, report",
        f"--out NEW --reuse {reference}",
    ):
        assert word in " ".join(printed.split()), printed
    assert committed(reference) == before


def test_reuse_does_only_the_rest(reference, tmp_path):
    run = tmp_path / "new"
    vhs("run", "debug/demo", "classifier.epochs=4", "--out", run, "--reuse", reference)
    worked = {json.loads(file.read_text())["stage"] for file in (run / "state" / "done").iterdir()}
    assert worked == {"train", "evaluate", "report"}
    old, new = committed(reference), committed(run)
    kept = [name for name in markers(reference) if not name.startswith(("classifier/", "predictions/", "report"))]
    assert len(kept) > 10 and all(new[name] == old[name] for name in kept)
    assert not set(name for name in markers(run) if name.startswith("classifier/")) & set(old)


def test_reuse_of_nothing_is_refused(tmp_path):
    printed = vhs("run", "debug/demo", "--out", tmp_path / "new", "--reuse", tmp_path / "old", code=1)
    assert "is not a run" in printed and not (tmp_path / "new").exists()


def test_dry_run_writes_nothing(tmp_path, reference):
    assert "a new run" in vhs("run", "debug/demo", "--out", tmp_path / "new", "--dry-run")
    assert not (tmp_path / "new").exists()
    assert "complete" in vhs("run", "debug/demo", "--out", reference, "--dry-run")


def test_a_first_start_that_fails_freezes_nothing(tmp_path, real_data):
    run = tmp_path / "run"
    for bad in (["data=nowhere"], ["data=phantoms", "edges=[10,8]"], ["data=phantoms", "dreambooth.instance_prompt='{colour} heart'"]):
        assert "error" in vhs("run", "debug/ctr", *bad, "--out", run, code=1)
    assert not (run / "plan.json").exists()
    assert "a new run" in vhs("run", "debug/ctr", f"data={real_data / 'ctr'}", "--out", run, "--dry-run")


def test_data_that_is_away_for_a_while_is_no_reject(tmp_path):
    """The unit fails and says so; with the data back the same command goes on, with every image."""
    from conftest import DATA

    if not DATA.is_dir():
        pytest.skip("no real radiographs: set VHS_TEST_DATA")
    data, away, run = tmp_path / "data", tmp_path / "away", tmp_path / "run"
    (data / "images").mkdir(parents=True)
    lines = (DATA / "ctr" / "labels.csv").read_text().splitlines()[:41]
    (data / "labels.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        shutil.copy(DATA / "ctr" / "images" / line.split(",")[0], data / "images")
    vhs("run", "debug/ctr", f"data={data}", "--out", run, environment={"VHS_CRASH_AT": "claim:1"}, code=-9)
    data.rename(away)
    assert "does not exist" in vhs("stage", "ingest", run, code=1) and not list((run / "real").glob("*.parquet"))
    (away / "images" / "ctr_0000.png").write_bytes((away / "images" / "ctr_0001.png").read_bytes())
    away.rename(data)
    assert "changed since the run began" in " ".join(vhs("stage", "ingest", run, code=1).split())
    shutil.copy(DATA / "ctr" / "images" / "ctr_0000.png", data / "images")
    vhs("stage", "ingest", run)
    assert json.loads((run / "real" / "rejects.json").read_text()) == []


def test_other_weights_under_the_same_name_are_refused(reference, tmp_path):
    from jobs import models

    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(models.WEIGHTS / "base", base)
    vhs("run", "debug/demo", f"base={base}", "--out", run, environment={"VHS_CRASH_AT": "claim:1"}, code=-9)
    (base / "scheduler" / "scheduler_config.json").write_text((base / "scheduler" / "scheduler_config.json").read_text() + "\n")
    printed = " ".join(vhs("run", "debug/demo", f"base={base}", "--out", run, code=1).split())
    assert "began with other weights: base was" in printed and "--reuse" in printed


def test_arms_that_differ_in_nothing_get_no_verdict(reference, tmp_path):
    """No image accepted: mixed falls back to real images, and the report says that there is nothing to compare."""
    run = tmp_path / "run"
    printed = " ".join(
        vhs("run", "debug/demo", "labeller.slack=1", "labeller.keep_quantile=0.51", "--out", run, "--reuse", reference).split()
    )
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert summary["generated"]["accepted"] < summary["generated"]["produced"]
    facts = [json.loads(file.read_text())["facts"] for file in run.glob("classifier/mixed/split/*.json")]
    assert [fact["generated"] for fact in facts] == [0], "the case was not met"
    assert (
        summary["paired"] is None
        and "No verdict" in printed
        and "No generated image was mixed in for mixed (split)" in (run / "report" / "index.html").read_text()
    )


def test_units_are_named_anew_when_something_decides_on_them_and_not_before(tmp_path):
    run = fill(tmp_path / "run", 2, until="label")
    stage, pending = frontier(run)
    named = run.units(stage)
    commit_nothing(run, pending[0])
    run.refresh()
    assert frontier(run) == (stage, pending[1:]) and run.units(stage) is named, "what is at work is not done, and nobody decided anything"
    run.storage.put("labels/corrections/split/00000.parquet", b"a person's word")
    run.refresh()
    assert frontier(run) == (stage, pending[1:]) and run.units(stage) is not named
    run.storage.delete("labels/corrections/split/00000.parquet")
    for unit in pending[1:]:
        commit_nothing(run, unit)
    run.refresh()
    assert frontier(run)[0] == "train"

"""Science is frozen at the first start, execution is free; a finished unit is reused where it is the same work."""

from __future__ import annotations

import json
import shutil

import pytest
from conftest import committed, markers, vhs

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
    assert "evaluate" in printed and "train" not in printed
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

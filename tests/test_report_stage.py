"""The report stage: what it makes of a finished run's inputs, and of inputs that were changed on the way to it."""

from __future__ import annotations

import html
import json
import re
from types import SimpleNamespace

import numpy as np

from jobs.attempt import Inputs
from jobs.config import load
from jobs.plan import Run, reopen
from jobs.stages import report
from jobs.unit import Marker
from shards import manifest


def reported(run, out, facts: dict[str, dict] | None = None, **columns) -> tuple[dict, str]:
    """The report stage worked again on a finished run's inputs -> (summary, page). `facts`: of a marker in a role that the run leaves empty; `columns` of
    a role's table are replaced: role=table -> {column: values}."""
    opened = reopen(str(run))
    (unit,) = opened.units("report")

    class Changed(Inputs):
        def markers(self, role):
            return [Marker("nowhere", "", facts[role])] if role in (facts or {}) else super().markers(role)

        def table(self, role):
            table = super().table(role)
            return table.assign(**columns[role](table)) if role in columns else table

    out.mkdir()
    report.work(opened.config, Changed(opened.storage, unit), SimpleNamespace(folder=out))
    return json.loads((out / "summary.json").read_text()), html.unescape((out / "index.html").read_text())


def grid(page: str, caption: str) -> list[list[str]]:
    """Head and rows of the table whose caption begins so."""
    table = re.search(re.escape(caption) + r".*?<table>(.*?)</table>", page, re.DOTALL)[1]
    return [re.findall(r"<t[hd][^>]*>([^<]*)<", row) for row in table.split("<tr>")[1:]]


def test_a_report_again_has_the_same_bytes(reference, tmp_path):
    reported(reference, tmp_path / "again")
    for name in ("index.html", "summary.json", "predictions/mixed.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (reference / "report" / name).read_bytes(), name


def test_a_test_part_without_labels_is_predicted_and_judges_nobody(reference, tmp_path):
    unlabelled = {"predictions": lambda table: {"label": table.label.where(table.role != "held-out", -1)}}
    summary, page = reported(reference, tmp_path / "out", **unlabelled)
    assert all(arm["test"] is None and arm["validation"] for arm in summary["arms"].values()) and summary["paired"] is None
    assert "the test part has no labels and no folds were run" in page
    assert (tmp_path / "out" / "predictions" / "mixed.csv").read_bytes() == (reference / "report" / "predictions" / "mixed.csv").read_bytes()


def test_near_copies_are_shown_beside_their_original(reference, tmp_path):
    run = reopen(str(reference))
    splits = manifest.read(run.storage, run.committed("split")[0]).to_pandas()
    key = splits.key[(splits.part == "train") & ~splits.inner_split].iloc[0]
    _, page = reported(reference, tmp_path / "out", labels=lambda table: {"near_key": key, "near_distance": np.arange(len(table)) * 1.0})
    assert 'alt="contact sheet: pairs images"' in page


def test_prompts_are_listed_by_what_they_are_then_by_their_rank(reference, tmp_path):
    row = {"accepted": 0.5, "agreement": 0.25, "distance": 3.5, "images": 12, "prompt": "photo of {token}", "rank": 1.333}
    ranking = [row, row | {"prompt": "{token} film", "rank": 1.667}]
    _, page = reported(reference, tmp_path / "out", facts={"prompts": {"ranking": ranking}})
    assert grid(page, "Prompts that were tried")[:2] == [
        ["prompt", "rank", "agreement", "accepted", "distance", "images"], ["photo of {token}", "1.33", "0.25", "0.5", "3.5", "12"]
    ]  # fmt: skip
    assert "figures of 12 images without uncertainty" in page


def test_the_plan_says_how_many_trainings_and_what_decides_instead():
    """What is frozen speaks of the test split, whatever decides; and one training of seed 0 is not none."""
    analysis = Run("nowhere", load("debug/demo"), read_only=True).analysis
    said = report._plan(analysis, "test")
    assert said["trainings"] == "1 of each arm and scope: seed 0" and said["folds"] == "none"
    assert said["primary endpoint"] == analysis["primary_endpoint"] and "on the test split" in said["primary endpoint"]
    several = report._plan(analysis | {"seeds": [3, 5], "folds": 4}, "cv")
    assert several["trainings"] == "2 of each arm and scope: seeds 3, 5"
    assert several["primary endpoint"].startswith(analysis["primary_endpoint"]) and "judged here on 4 folds instead" in several["primary endpoint"]
    assert report._plan(analysis | {"arms": ["real-matched", "null"]}, "test")["primary endpoint"] == "none, for mixed is not among the arms"


def test_the_page_says_how_many_trainings_and_which(reference):
    page = html.unescape((reference / "report" / "index.html").read_text())
    assert "<dd>1 of each arm and scope: seed 0</dd>" in page and page.count("<td>1<small>seed 0</small></td>") == 3, "three arms are trained"

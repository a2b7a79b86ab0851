"""The report stage: what it makes of a finished run's inputs, and of inputs that were changed on the way to it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from jobs import batches, lineage
from jobs.attempt import Inputs
from jobs.batches import load_images
from jobs.config import load
from jobs.plan import Run, reopen
from jobs.stages import report
from jobs.unit import Marker
from shards import manifest
from vhs.phantom import draw_many


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


@pytest.fixture(scope="module")
def stand_ins(reference) -> dict[str, np.ndarray]:
    """Images to put in place of the generated ones: near-copies of training and of held-out images, and phantoms of patients that nobody has."""
    opened = reopen(str(reference))
    (unit,) = opened.units("report")
    scope, rng = lineage.split_rows(Inputs(opened.storage, unit)), np.random.default_rng(0)

    def like(rows: pd.DataFrame) -> np.ndarray:
        images = load_images(opened.storage, rows)
        return np.clip(images + rng.normal(0, 3, images.shape), 0, 255).astype(np.uint8)

    fresh, _ = draw_many("canine_lateral", "clinic", range(620_000_000, 620_000_060))
    return {"training": like(scope.training), "held_out": like(scope.held_out), "fresh": fresh}


def planted(reference, out, monkeypatch, images: np.ndarray) -> tuple[dict, str]:
    """The report where each generated image is one of `images`. Its labels, and so who was accepted, stay."""
    opened = reopen(str(reference))
    keys = manifest.load(opened.storage, paths=opened.committed("generate")).to_pandas().key
    place = {key: images[number % len(images)] for number, key in enumerate(keys)}
    monkeypatch.setattr(
        batches, "load_images", lambda storage, rows: np.stack([place.get(key, image) for key, image in zip(rows.key, load_images(storage, rows))])
    )
    return reported(reference, out)


def tiles(page: str, sheet: str) -> np.ndarray:
    """The tiles of a sheet of pairs without their captions: float [pairs, 2, side, side]."""
    data = re.search(rf'alt="contact sheet: {sheet} images" src="data:image/png;base64,([^"]+)"', page)[1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"), float)
    corners = [(y, x) for y in range(0, picture.shape[0], 148) for x in range(0, picture.shape[1], 148)]
    return np.stack([picture[y:y + 110, x:x + 144] for y, x in corners]).reshape(-1, 2, 110, 144)


@pytest.mark.parametrize("kind", ["training", "held_out", "fresh"])
def test_copies_show_on_the_side_that_they_are_of(reference, stand_ins, tmp_path, monkeypatch, kind):
    """Near-copies of training images by their share, their distance and their sheet; of held-out images likewise; other images by none. Nobody is refused."""
    summary, page = planted(reference, tmp_path / "out", monkeypatch, stand_ins[kind])
    likeness, undisturbed = summary["likeness"], json.loads((reference / "report" / "summary.json").read_text())
    assert summary["generated"] == undisturbed["generated"] and likeness["nearest"]["all"]["generated images"] == summary["generated"]["accepted"]
    found, (low, high) = likeness["nearer to training"], likeness["nearer to training"]["chance"]
    medians = likeness["nearest"]["all"]
    apart = {side: np.abs(np.diff(tiles(page, sheet), axis=1)).mean() for side, sheet in (("training", "pairs"), ("held_out", "pairs_held_out"))}
    if kind == "training":
        assert found["share"] > 0.95 and found["share"] > high and found["images"] == medians["generated images"]
        assert medians["to training"] < 0.25 * medians["held-out to training"] and apart["training"] < 5 < apart["held_out"]
    elif kind == "held_out":
        assert found["share"] < 0.05 and found["share"] < low and found["images"] == 0
        assert medians["to held-out"] < 0.25 * medians["held-out to training"] and apart["held_out"] < 5 < apart["training"]
    else:
        assert low <= found["share"] <= high and 0.25 < found["share"] < 0.75 and min(apart.values()) > 5
        assert 0.7 < medians["to training"] / medians["held-out to training"] < 1.4
    assert f"{medians['to training']:.3g}" in [cell for row in grid(page, "Median distance of accepted") for cell in row]


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

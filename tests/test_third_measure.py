"""A measure of one's own is one entry of VIEWS: the Norberg angle of the hip, from files with key points to a report."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
import torch

from jobs import plan
from jobs.config import Config, ConfigError
from jobs.drive import drive
from shards import manifest
from vhs.measure import VIEWS, View
from vhs.sources import SourceError


# --- the measure: all that it takes -------------------------------------------------------------------------------------------------
def norberg(points):
    """Mean of both hips' angles in degrees between the line joining the femoral head centres and the line to the cranial acetabular rim."""
    angles = []
    for head, other, rim in ((0, 1, 2), (1, 0, 3)):
        u, v = points[..., other, :] - points[..., head, :], points[..., rim, :] - points[..., head, :]
        cross, dot = abs(u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]), (u * v).sum(-1)
        angles.append(torch.atan2(cross, dot) if torch.is_tensor(cross) else np.arctan2(cross, dot))
    return sum(angles) * (90 / np.pi)


# Norberg in Olsson, Ugeskrift för Veterinärer (1961); Culp et al., Vet Surg 35:453 (2006): 105 degrees and more is a normal hip, here "large"
HIPS = View(
    name="canine_pelvis", index="Norberg", formula=norberg, subject="dog", points=("head_left", "head_right", "rim_left", "rim_right"),
    axes=((0, 1), (0, 2), (1, 3)), mirror=(1, 0, 3, 2), edges=(90.0, 105.0), high_is_large=True, bin_width=5.0, plausible=(50.0, 150.0),
    axes_ratio=(0.8, 8.0),
)  # fmt: skip
# ------------------------------------------------------------------------------------------------------------------------------------


def hips(degrees: float, rng) -> np.ndarray:
    """Points of a symmetric pelvis, tilted a little, in a 128 px image."""
    heads = np.array([[40.0, 72], [88, 72]]) + rng.uniform(-5, 5, 2)
    angle, rim = np.radians(degrees), rng.uniform(17, 22)
    away = rim * np.array([np.cos(angle), -np.sin(angle)])
    points, tilt = np.concatenate([heads, heads + [away, away * [-1, 1]]]), rng.uniform(-0.08, 0.08)
    turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
    return (points - 64) @ turn.T + 64


@pytest.mark.parametrize("degrees", [70, 90, 104.9, 105.1, 120])
def test_the_angle_is_what_was_drawn_in_numpy_and_torch(degrees):
    points = hips(degrees, np.random.default_rng(0))
    leaf = torch.from_numpy(points.copy()).requires_grad_()
    index = HIPS.measure(leaf)
    index.backward()
    assert HIPS.measure(points) == pytest.approx(degrees) == pytest.approx(index.item())
    assert torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0
    assert HIPS.measure((points * [-1, 1])[list(HIPS.mirror)] * 3 + 7) == pytest.approx(degrees)  # another scale, mirrored
    assert HIPS.classify(degrees) == (degrees >= 90) + (degrees >= 105)


def test_the_edge_is_healthy_unless_a_config_says_otherwise():
    assert HIPS.with_edges(None).classify([89.9, 90, 105]).tolist() == [0, 1, 2]
    assert HIPS.with_edges(None, high_is_large=False).classify([105]).tolist() == [1]


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(VIEWS, HIPS.name, HIPS)


def test_what_does_not_come_with_the_view_is_named(known, tmp_path):
    with pytest.raises(SourceError, match="drawn for canine_lateral, human_frontal, not for canine_pelvis"):
        plan.start(Config(name="hips", view=HIPS.name), str(tmp_path / "run"))
    write(tmp_path / "data", 2)
    with pytest.raises(ConfigError, match="none for canine_pelvis. Set labeller.init=scratch"):
        plan.start(Config(name="hips", view=HIPS.name, data=str(tmp_path / "data")), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "plan.json").exists()


def write(data, count: int):
    """A folder as a user would bring it: two discs and two bars an image, and a CSV of key points."""
    rng = np.random.default_rng(1)
    data.mkdir()
    with (data / "labels.csv").open("w", newline="") as table:
        rows = csv.writer(table)
        rows.writerow(["file", "patient", *(f"{name}_{axis}" for name in HIPS.points for axis in "xy")])
        for number in range(count):
            points = hips((80, 97, 112)[number % 3] + rng.uniform(-5, 5), rng)
            image = rng.integers(20, 40, (128, 128)).astype(np.uint8)
            spots = [tuple(np.round(point).astype(int).tolist()) for point in points]
            for head, rim in ((0, 2), (1, 3)):
                cv2.line(image, spots[head], spots[rim], 120, 4)
                cv2.circle(image, spots[head], 10, 220, -1)
            cv2.imwrite(str(data / f"{number}.png"), image)
            rows.writerow([f"{number}.png", f"dog {number}", *points.ravel().tolist()])


def test_a_run_measures_hips(known, tmp_path):
    write(tmp_path / "data", 36)
    config = Config.model_validate(
        {
            "name": "hips",
            "view": HIPS.name,
            "resolution": 128,
            "data": str(tmp_path / "data"),
            "arms": ["measure"],
            "labeller": {"init": "scratch", "size_px": 64, "steps": 70, "learning_rate": 6e-3, "passes": 2, "slack": 3},
            "priors": {"images": 3, "steps": 1, "batch": 1},
            "dreambooth": {"steps": 1, "batch": 1, "prior_loss_weight": 0},
            "generation": {"steps": 1, "unit_images": 2, "batch": 2, "max_rounds": 1, "round_units": 1, "quota": 1},
        }
    )
    run = plan.start(config, str(tmp_path / "run"))
    drive(run)
    summary = json.loads(run.storage.read("report/summary.json"))
    assert summary["labeller"]["index_mae"] < 6, "degrees; one that always said the mean would be 11 off"
    rows = manifest.read(run.storage, run.committed("evaluate")[0]).to_pandas()
    assert rows.label.tolist() == HIPS.classify(rows["index"]).tolist() and rows["index"].between(70, 120).all()
    assert set(summary["arms"]) == {"measure"} and "Norberg" in run.storage.read("report/index.html").decode()

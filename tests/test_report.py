from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vhs import metrics, split
from vhs.measure import VIEWS
from vhs.report import contact_sheet, forest, labeller_scatter, overlay, render
from vhs.report.overlay import AXIS_COLOURS
from vhs.settings import Split

VIEW = VIEWS["canine_lateral"]
POINTS = np.array([[20, 20], [60, 70], [22, 66], [64, 28], [10, 8], [80, 8]], dtype=np.float32)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(images: int = 60) -> tuple[dict, dict, dict, dict]:
    """Summary, tables, figures and notes of a made-up run that fills every section of the page."""
    rng = np.random.default_rng(0)
    index = rng.normal(9.2, 1.3, images)
    label = VIEW.classify(index)

    def answers(arm: str, right: float, seed: int, scope: str = "split") -> pd.DataFrame:
        return pd.DataFrame({
            "key": [f"{scope}{i}" for i in range(images)], "arm": arm, "scope": scope, "seed": seed, "patient": None,
            "source": np.where(index > 9, "north", "south"), "label": label, "index": index,
            "predicted": np.where(rng.random(images) < right, label, (label + 1) % 3),
        })

    tested = [answers(arm, right, seed) for arm, right in (("real", 0.7), ("real-matched", 0.72), ("mixed", 0.8)) for seed in (0, 1)]
    folds = [answers("real", 0.7, 0, scope) for scope in ("fold-0", "fold-1")]
    predictions = pd.concat([*tested, answers("measure", 0.85, metrics.NO_SEED), *folds])
    measured = pd.DataFrame({"label": label, "index": index, "measured": index + rng.normal(0, 0.2, images)})
    reason = np.where(index > 8, "", "implausible geometry")
    generated = pd.DataFrame({"prompted": label, "measured": label[::-1], "accepted": index > 8, "reason": reason})
    quality, funnel = metrics.labeller_quality(measured, VIEW), metrics.generated_counts(generated, asked=72)
    summary = metrics.summary(predictions, labeller=quality, generated=funnel)
    tables = metrics.tables(predictions[predictions.scope == "split"], VIEW) | metrics.generated_tables(generated)
    images_split = split.make_split(answers("real", 1, 0), Split())
    tables["splits"] = split.counts(images_split, "split")
    sheet = contact_sheet([overlay(np.full((96, 96), 60, np.uint8), POINTS, VIEW, "VHS 9.1", scale=2)] * 5, columns=3)
    figures = {"forest": forest(summary), "labeller": labeller_scatter(measured, VIEW), "real": sheet, "generated": sheet}
    notes = {
        "title": "Dogs & hearts", "plan": {"primary endpoint": "mixed minus real-matched"}, "limits": ["Fewer than <100> dogs."],
        "patients_known": split.patients_known(images_split),
    }
    return summary, tables, figures, notes


@pytest.fixture(scope="module")
def full() -> tuple:
    return run()


def test_every_section_and_the_verdict_first(full):
    page = render(*full)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page[page.index("<body>"):])).replace("\u00a0", " ")
    sentence = metrics.verdict(full[0]["paired"])
    assert sentence in text and text.index(sentence) < text.index("Arms")
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == ["arms", "where", "confusion", "generated", "labeller", "sheets", "data", "plan", "limits"]
    low, high = (f"{100 * bound:.1f}" for bound in full[0]["arms"]["mixed"]["test"]["ci95"])
    assert f"[{low}, {high}]" in text and "real-matched" in text and "implausible geometry" in text and "not for diagnosis" in text
    assert "do not name their patient" in text and "Fewer than <100> dogs." in text and "Fewer than <100>" not in page


def test_the_page_holds_no_address_and_no_id_twice(full):
    page = render(*full)
    assert "://" not in page and "@import" not in page and "<script" not in page
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in re.findall(r'(?:src|href)="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_same_figures_same_bytes(full):
    summary, tables, figures, notes = run()
    assert figures == full[2] and render(summary, tables, figures, notes) == render(*full)
    assert b"currentColor" in figures["forest"] and b"--accent" in figures["forest"] and b"#010203" not in figures["forest"]
    ElementTree.fromstring(figures["forest"])  # also a file of its own


def test_a_run_with_little_to_say_still_has_a_page():
    arm = {"test": {"accuracy": 0.5, "ci95": [0.2, 0.8]}, "cv": None, "seeds": [0]}
    nothing = {"asked": 3, "produced": 0, "accepted": 0, "agreement": None}
    summary = {"arms": {"real": arm}, "paired": None, "labeller": None, "generated": nothing}
    page = render(summary, {"by_seed": pd.DataFrame(columns=["arm", "seed"])}, {"forest": forest(summary)}, {})
    assert re.findall(r'<section id="(\w+)"', page) == ["arms", "generated", "limits"]
    assert "No verdict" in page and "The measured class is" not in page and "cross-validation</th>" not in page


def test_unknown_parts_are_refused(full):
    with pytest.raises(ValueError, match="shows no table called by_sauce; it knows by_source, by_class"):
        render(full[0], {"by_sauce": full[1]["by_source"]}, {}, {})
    with pytest.raises(ValueError, match="shows no figure called funnel"):
        render(full[0], {}, {"funnel": b""}, {})
    with pytest.raises(ValueError, match="figure real is neither an SVG nor a PNG"):
        render(full[0], {}, {"real": b"\xff\xd8\xff jpeg"}, {})


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_overlay_draws_axes_where_the_points_are(view):
    image = np.full((96, 90), 50, np.uint8)
    points = POINTS[: len(view.points)]
    drawn = overlay(image, points, view, scale=2)
    assert drawn.shape == (192, 180, 3) and drawn.dtype == np.uint8
    for axis, (i, j) in enumerate(view.axes):
        x, y = np.round((points[i] * 0.7 + points[j] * 0.3 + 0.5) * 2 - 0.5).astype(int)
        near = drawn[y - 2:y + 3, x - 2:x + 3].reshape(-1, 3)
        assert (near == AXIS_COLOURS[axis]).all(axis=1).any()
    assert (drawn[-4:] == 50).all() and (overlay(image, points, view, "a caption far too long for so small an image")[-4:] != 50).any()
    assert (image == 50).all()


def test_overlay_survives_points_outside_and_refuses_a_wrong_count():
    assert overlay(np.zeros((64, 64), np.uint8), POINTS * 10 - 100, VIEW).shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"draws 6 points \(A, B, C, D, E, F\), got an array of shape \(4, 2\)"):
        overlay(np.zeros((64, 64), np.uint8), POINTS[:4], VIEW)


def test_contact_sheet_places_tiles_in_rows():
    tiles = [np.full((10, 10), 40 * i, np.uint8) for i in range(4)] + [np.full((8, 6, 3), 200, np.uint8)]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(tiles, columns=3))))
    assert sheet.shape == (24, 38, 4)
    assert [int(sheet[y + 5, x + 5, 0]) for y in (0, 14) for x in (0, 14, 28)] == [0, 40, 80, 120, 200, 0]
    assert sheet[5, 12, 3] == 0 and contact_sheet(tiles, 3) == contact_sheet(tiles, 3)
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet([], 3)


def test_importing_the_report_loads_neither_matplotlib_nor_torch():
    code = "import sys, vhs.report, vhs.metrics, vhs.split; print([name for name in ('matplotlib', 'torch', 'cv2') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page is not opened in a browser")
def test_the_page_fits_a_screen_and_a_phone(full, tmp_path):
    """The page in frames of 1200 and 400 px: nothing sticks out to the right, marks take the page's accent, images are decoded."""
    page = html.escape(render(*full), quote=True)
    frames = [f'<iframe srcdoc="{page}" style="border:0;height:900px;width:{width}px"></iframe>' for width in (1200, 400)]
    probe = """<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, root = page.documentElement, mark = page.querySelector("figure.forest path[style*='--accent']")
        return {asked: frame.clientWidth, wide: root.scrollWidth, tall: root.scrollHeight, heading: page.querySelector("h1").textContent,
                svg: page.querySelector("figure.forest svg").clientWidth, images: [...page.images].map(image => image.naturalWidth),
                accent: getComputedStyle(root).getPropertyValue("--accent").trim(), mark: getComputedStyle(mark).stroke} })) }</script>"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><meta charset=utf-8><body>{frames[0]}{frames[1]}{probe}", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [CHROMIUM, *options, "--dump-dom", (tmp_path / "frames.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\[.*?\])</title>", shown.stdout, re.DOTALL)
    assert title, shown.stderr[-2000:]
    found = json.loads(html.unescape(title[1]))
    assert [seen["asked"] for seen in found] == [1200, 400]
    for seen in found:
        assert seen["wide"] <= seen["asked"] and seen["tall"] > 1000 and 200 < seen["svg"] <= seen["asked"]
        assert seen["heading"].replace("\u00a0", " ") == metrics.verdict(full[0]["paired"]) and seen["images"] == [584, 584]
        assert seen["mark"] == "rgb({}, {}, {})".format(*bytes.fromhex(seen["accent"].lstrip("#")))

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

from vhs import metrics
from vhs.measure import CLASSES, VIEWS
from vhs.report import agreement, captioned, contact_sheet, curves, fitted, forest, index_bins, labeller_scatter, overlay, render
from vhs.report.overlay import AXIS_COLOURS

VIEW = VIEWS["canine_lateral"]
POINTS = np.array([[20, 20], [60, 70], [22, 66], [64, 28], [10, 8], [80, 8]], dtype=np.float32)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


SECTIONS = ["arms", "data", "where", "confusion", "labeller", "generated", "likeness", "memorisation", "sheets", "curves", "files", "plan",
            "limits"]  # fmt: skip


def run(images: int = 60, seeds: tuple[int, ...] = (0, 1), **options) -> tuple[dict, dict, dict, dict]:
    """Summary, tables, figures and notes of a made-up run that fills every section of the page; `options` go to metrics.summary."""
    rng = np.random.default_rng(0)
    index = rng.normal(9.2, 1.3, images)
    label = VIEW.classify(index)

    def answers(arm: str, right: float, seed: int, scope: str = "split", role: str = "held-out") -> pd.DataFrame:
        predicted = np.where(rng.random(images) < right, label, (label + 1) % 3)
        return pd.DataFrame({
            "key": [f"{scope}{role}{i}" for i in range(images)], "arm": arm, "scope": scope, "seed": seed, "role": role, "patient": None,
            "source": np.where(index > 9, "north", "south"), "label": label, "index": index, "predicted": predicted,
            **{f"p_{name}": np.where(predicted == i, 0.8, 0.1) for i, name in enumerate(CLASSES)},
        })

    tested = [answers(arm, right, seed) for arm, right in (("real", 0.7), ("real-matched", 0.72), ("mixed", 0.8)) for seed in seeds]
    tested.append(answers("real", 0.75, 0, role="validation"))
    folds = [answers("real", 0.7, 0, scope) for scope in ("fold-0", "fold-1")]
    predictions = pd.concat([*tested, answers("measure", 0.85, metrics.NO_SEED), *folds])
    measured = pd.DataFrame({
        "label": label, "predicted": label, "index": index, "measured": index + rng.normal(0, 0.2, images), "spread": rng.random(images),
        "source": np.where(index > 9, "north", "south"),
    })
    reason = np.where(index > 8, "", "implausible geometry")
    generated = pd.DataFrame({"prompted": label, "measured": label[::-1], "accepted": index > 8, "reason": reason, "index": index})
    features = [pd.DataFrame({"label": label, "patient": [f"p{i}" for i in range(images)], "feature": list(rng.normal(k, 1, (images, 4)))}) for k in (0, 1)]
    likeness = {"features": "labeller features", "classes": {}, "probe": metrics.probe_auroc(*features), "nearest": {}, "nearer to training": None}
    quality, funnel = metrics.labeller_quality(measured), metrics.generated_counts(generated, asked=72)
    summary = metrics.summary(predictions, labeller=quality, generated=funnel, likeness=likeness, **options)
    tables = metrics.tables(metrics.judged(predictions)[1], VIEW) | metrics.generated_tables(generated)
    tables |= {"likeness": metrics.frechet_by_class(*features), "measurement": metrics.measurement_by(measured, "source")}
    of_generators = pd.DataFrame({"generator": ["this run's DreamBooth", "base"], "images": [46, 40], "AUROC": [0.946, 0.951]})
    tables |= {"probes": of_generators, "nearer": of_generators.rename(columns={"AUROC": "share, %"})}
    near = pd.DataFrame({"label": label, "to_training": rng.random(images), "to_held_out": rng.random(images)})
    tables |= {"nearest": metrics.distances_by_class(near, near)}
    tables["composition"] = pd.DataFrame({"images": ["training", "arm mixed"], "origin": ["real", "generated"], "small": [9, 30], "all": [60, 90]})
    sheet = contact_sheet([overlay(np.full((96, 96), 60, np.uint8), POINTS, VIEW, "VHS 9.1", scale=2)] * 5, columns=3)
    learnt = pd.DataFrame([
        {"model": model, "series": series, "number": 0, "step": step, "figure": figure, "value": 1 / (1 + step)}
        for model, series in (("classifier", "real"), ("classifier", "mixed"), ("DreamBooth", "DreamBooth"))
        for step in range(0, 40, 4) for figure in ("loss", "validation_loss", "validation_accuracy")
    ])
    drawn = {"forest": forest(summary), "labeller": labeller_scatter(measured, VIEW), "agreement": agreement(measured, VIEW)}
    drawn |= {"bins": index_bins(metrics.generated_by_index(generated, VIEW), VIEW), "curves": curves(learnt)}
    figures = drawn | dict.fromkeys(("real", "generated", "true", "measured", "rejected", "pairs", "pairs_held_out"), sheet)
    notes = {
        "title": "Dogs & hearts", "index": "VHS", "plan": {"primary endpoint": "mixed minus real-matched"}, "limits": ["Fewer than <100> dogs."],
        "versions": {"torch": "2.14", "cuda": ""},
    }
    return summary, tables, figures, notes


@pytest.fixture(scope="module")
def full() -> tuple:
    return run(patients_known=False)


def test_every_section_and_the_verdict_first(full):
    page = render(*full)
    text = html.unescape(re.sub(r"<[^>]+>", " ", page[page.index("<body>"):])).replace("\u00a0", " ")
    sentence = metrics.verdict(full[0])
    assert sentence in text and text.index(sentence) < text.index("Arms")
    sections = re.findall(r'<section id="(\w+)"', page)
    assert sections == SECTIONS
    low, high = (f"{100 * bound:.1f}" for bound in full[0]["arms"]["mixed"]["test"]["ci95"])
    assert f"[{low}, {high}]" in text and "real-matched" in text and "implausible geometry" in text and "not for diagnosis" in text
    assert text.count("Patients unknown.") >= 10 and "Patients unknown" not in render(*run()) and "large = 0, normal = 1, small = 2" in text
    assert "of 60 clusters of near-duplicates" in text and "Generated with torch 2.14." in text and "Descriptive" not in text
    assert "Fewer than <100> dogs." in text and "Fewer than <100>" not in page


def test_the_page_holds_no_address_and_no_id_twice(full):
    page = render(*full)
    assert "://" not in page and "@import" not in page and "<script" not in page
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in re.findall(r'(?:src|href)="([^"]*)"', page))
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', page)) <= set(ids)


def test_same_figures_same_bytes(full):
    summary, tables, figures, notes = run(patients_known=False)
    assert figures == full[2] and render(summary, tables, figures, notes) == render(*full)
    assert b"currentColor" in figures["forest"] and b"--accent" in figures["forest"] and b"#010203" not in figures["forest"]
    for name in ("forest", "labeller", "agreement", "bins", "curves"):
        ElementTree.fromstring(figures[name])  # also a file of its own


def filled(summary: dict) -> list[bool]:
    """Of each difference in the forest, whether its mark is filled."""
    marks = re.findall(r"<use [^>]*accent[^>]*>", forest(summary).decode())
    return ["fill-opacity: 0" not in mark for mark in marks[-len(summary["differences"]):]]


def test_without_the_primary_pair_nothing_is_called_the_verdicts(full):
    """A run of controls: its first difference is none that a verdict rests on, and no DreamBooth stands behind it."""
    summary = full[0]
    pair = summary["differences"][0] | {"arms": ["null", "real-matched"]}
    arms = {"real-matched": summary["arms"]["real-matched"], "null": summary["arms"]["mixed"]}
    alone = summary | {"arms": arms, "paired": None, "differences": [pair], "generated": None, "likeness": None}
    page = html.unescape(render(alone, {}, {"forest": forest(alone)}, {}))
    assert "No verdict: none was planned, for mixed is not among the arms" in page.replace("\u00a0", " ") and "null − real-matched" in page
    assert "No verdict rests on any of them." in page and "There is no verdict" in page
    for words in ("the verdict rests on, and was planned", "the verdict's filled", "another DreamBooth", "labelled by measuring", "carries the verdict"):
        assert words not in page and words in html.unescape(render(*full)), words
    assert filled(summary) == [True, False] and filled(alone) == [False]


def test_what_could_have_been_found_has_one_meaning_wherever_it_stands(full):
    page = html.unescape(render(*full))
    said = re.search(r"would find (\S+) points four times in five", metrics.verdict(full[0]))[1]
    assert re.search(r"what generation brought</small></th>\s*<td>[^<]*</td><td>([^<]*)</td>", page)[1] == said
    assert float(said) == pytest.approx(100 * metrics.detectable(full[0]["paired"]["ci95"]), abs=0.051) and "half-width" not in page.lower()


PLANNED, CORRECTED, ONCE = "planned to describe its data, not to decide", "corrected after the held-out images had been judged", "each arm was trained once"


@pytest.mark.parametrize(("options", "seeds", "why"), [
    ({}, (0, 1), []), ({"purpose": "descriptive"}, (0, 1), [PLANNED]), ({"corrected": True}, (0, 1), [CORRECTED]), ({}, (0,), [ONCE]),
    ({"purpose": "descriptive", "corrected": True}, (0,), [PLANNED, CORRECTED, ONCE]),
])  # fmt: skip
def test_a_page_says_why_it_only_describes_and_no_other_reason(options, seeds, why):
    page = render(*run(seeds=seeds, **options))
    below = re.search(r"</h1>(.*?)</header>", page, re.DOTALL)[1]
    assert bool(re.search(r"<h1>Descriptive: [a-z]", page)) == bool(why)
    assert [words for words in (PLANNED, CORRECTED, ONCE) if words in below] == why


def test_a_test_part_without_labels_still_has_a_page(full):
    """The verdict rests on the folds, and the page says so; where there are none it says that."""
    figures = full[0]["arms"]["real"]["cv"]
    arms = {arm: {"test": None, "validation": None, "cv": figures, "seeds": [0]} for arm in ("real-matched", "mixed")}
    paired = {**full[0]["paired"], "from": "cv"}
    summary = {**full[0], "arms": arms, "paired": paired, "unlabelled": 40}
    page = html.unescape(render(summary, {}, {"forest": forest(summary)}, {"judged": "cv"})).replace("\u00a0", " ")
    assert "out of fold, for the test part lacks labels" in page and "the 40 without a label included" in page
    assert '<th scope="col" class="n">cross-validation</th>' in page and '<th scope="col" class="n">test</th>' not in page
    nothing = {**summary, "arms": {"real": {**arms["mixed"], "cv": None}}, "paired": None}
    assert "the test part has no labels and no folds were run" in render(nothing, {}, {"forest": forest(nothing)}, {})


def test_what_a_distance_means_and_who_was_refused_before_stand_with_the_distances(full):
    summary, tables, figures, notes = full
    page = html.unescape(render(summary, tables, figures, notes))
    section = page[page.index('<section id="memorisation">'):page.index('<section id="sheets">')]
    assert "A distance of 0 is a copy and 1 is what lies between two training patients" in section and "0 near-copies of training images" in section
    assert section.count("contact sheet: pairs") == 2 and "held-out to training" in section and "this run's DreamBooth" in section
    copied = tables["rejections"].assign(**{"near-copy": [1, 0, 4]})
    assert "5 near-copies of training images" in html.unescape(render(summary, tables | {"rejections": copied}, figures, notes))
    alone = html.unescape(render(summary, {name: table for name, table in tables.items() if name not in ("nearer", "rejections")}, figures, notes))
    assert "nobody can say how many lie nearer to which" in alone and "near-copies" not in alone
    without = {name: table for name, table in tables.items() if name not in ("nearer", "nearest")}
    assert '<section id="memorisation">' not in render(summary, without, figures, notes)


def test_a_run_with_little_to_say_still_has_a_page():
    figures = {"accuracy": 0.5, "ci95": [0.2, 0.8], "balanced_accuracy": 0.5, "balanced_ci95": [0.2, 0.8], "auroc": None, "ece": None}
    arm = {"test": figures, "validation": None, "cv": None, "seeds": [0]}
    nothing = {"asked": 3, "produced": 0, "accepted": 0, "agreement": None}
    summary = {"arms": {"real": arm}, "paired": None, "differences": [], "labeller": None, "generated": nothing, "likeness": None}
    summary |= {"purpose": "confirmatory", "corrected": False, "patients_known": True, "unlabelled": 0}
    page = render(summary, {"by_seed": pd.DataFrame(columns=["arm", "seed"])}, {"forest": forest(summary)}, {})
    assert re.findall(r'<section id="(\w+)"', page) == ["arms", "generated", "files", "limits"]
    assert "No verdict" in page and "The measured class is" not in page and "cross-validation</th>" not in page


def test_unknown_parts_are_refused(full):
    with pytest.raises(ValueError, match="shows no table called by_sauce; it knows by_class, by_source"):
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


def test_points_stay_on_their_spot_when_an_image_is_fitted():
    image = np.zeros((60, 90), np.uint8)
    image[30:32, 60:62] = 255
    small, scale = fitted(image, 270)
    assert small.shape == (180, 270) and scale == 3
    y, x = np.unravel_index(small.astype(int).argmax(), small.shape)
    assert abs(x - ((60.5 + 0.5) * scale - 0.5)) <= scale and abs(y - ((30.5 + 0.5) * scale - 0.5)) <= scale
    assert captioned(image, "").shape == (60, 90, 3) and (captioned(image, "a word") != captioned(image, "")).any()


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
        assert seen["heading"].replace("\u00a0", " ") == metrics.verdict(full[0]) and seen["images"] == [584] * 7
        assert seen["mark"] == "rgb({}, {}, {})".format(*bytes.fromhex(seen["accent"].lstrip("#")))

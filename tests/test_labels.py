"""A person's word on generated images: out as a table, in as corrections, and only what reads them is redone."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import vhs
from scipy.io import loadmat, savemat

from jobs import labels, plan
from jobs.config import load
from jobs.drive import drive
from vhs.measure import CLASSES


@pytest.fixture
def run(reference, tmp_path):
    """A finished run of one's own."""
    return shutil.copytree(reference, tmp_path / "run")


def rows_of(file) -> list[dict]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def write(file, rows: list[dict]):
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader(), writer.writerows(rows)


def opened(run):
    return plan.reopen(str(run), read_only=True)


@pytest.mark.parametrize("name", ["labels.csv", "labels.mat"])
def test_what_was_exported_says_nothing_new(run, tmp_path, name):
    before = labels.table(opened(run))
    assert f"{len(before)} labels" in vhs("labels", run, "export", tmp_path / name)
    assert "nothing in it differs" in vhs("labels", run, "import", tmp_path / name)
    assert not (run / "labels" / "corrections").exists()


def test_the_export_tells_what_was_measured_and_shows_it(run, tmp_path):
    vhs("labels", run, "export", tmp_path / "l.csv", "--images", tmp_path / "pictures")
    rows, now = rows_of(tmp_path / "l.csv"), labels.table(opened(run))
    assert [row["key"] for row in rows] == now.key.tolist()
    assert [float(row["index"]) for row in rows] == pytest.approx(now["index"].tolist(), abs=1e-4)
    assert {row["label_source"] for row in rows} == {"machine"} and all(row["prompt"] for row in rows)
    points = np.array([[float(row[f"{name}_{axis}"]) for name in "ABCDEF" for axis in "xy"] for row in rows])
    assert np.allclose(points, np.stack(now.points), atol=1e-3)
    assert {file.stem for file in (tmp_path / "pictures").iterdir()} == set(now.key)


def test_points_from_a_person_decide_the_class_and_only_readers_are_redone(run, tmp_path):
    vhs("labels", run, "export", tmp_path / "l.csv")
    rows = rows_of(tmp_path / "l.csv")
    large = {"A": (30, 40), "B": (30, 90), "C": (20, 60), "D": (60, 60), "E": (20, 15), "F": (60, 15)}  # VHS 13.5
    rows[0] |= {f"{name}_{axis}": str(value) for name, pair in large.items() for axis, value in zip("xy", pair)} | {"accepted": "yes"}
    rows[1] |= {"accepted": "no" if rows[1]["accepted"] == "yes" else "yes"}
    write(tmp_path / "l.csv", rows[:2])
    made = {json.loads(file.read_text())["unit"] for file in (run / "state" / "done").iterdir()}
    shutil.rmtree(run / "state" / "done")
    assert "2 labels corrected" in vhs("labels", run, "import", tmp_path / "l.csv")
    now = labels.table(opened(run)).set_index("key")
    first, second = now.loc[rows[0]["key"]], now.loc[rows[1]["key"]]
    assert CLASSES[first.label] == "large" and first["index"] == pytest.approx(13.5) and first.accepted and first.reason == ""
    assert second.accepted == (rows[1]["accepted"] == "yes") and (first.label_source, second.label_source) == ("hand", "hand")
    vhs("run", "debug/demo", "--out", run)
    redone = {json.loads(file.read_text())["unit"] for file in (run / "state" / "done").iterdir()}
    assert redone < made and {"classifier/mixed/split/seed-0", "report"} <= redone
    assert not [unit for unit in redone if unit.startswith(("labels", "generated", "labeller", "generator", "classifier/real/"))]
    assert len(list(run.glob("rounds/split/*.json"))) == 2  # listed rounds stay
    vhs("verify", run, "--full")
    page, summary = (run / "report" / "index.html").read_text(), json.loads((run / "report" / "summary.json").read_text())
    assert re.search(r"mixed</th><th[^>]*>test</th><th[^>]*>import 1</th><td>2</td>", page) and "held-out images of split had been judged" in page
    assert (summary["purpose"], summary["corrected"]) == ("confirmatory", True) and "planned to describe its data" not in page


def test_what_a_person_should_look_at_first(run, tmp_path):
    """The class that the measurement leaves most open; what was looked at does not come again."""
    now = labels.table(opened(run))
    assert "7 labels" in vhs("labels", run, "export", tmp_path / "l.csv", "--most-uncertain", 7, "--images", tmp_path / "pictures")
    first = rows_of(tmp_path / "l.csv")
    margin = (np.abs(now["index"].to_numpy()[:, None] - (8.2, 10)).min(1) / now.spread).to_numpy()
    assert {row["key"] for row in first} == set(now.key[np.argsort(margin)[:7]]) and len(list((tmp_path / "pictures").iterdir())) == 7
    for row in first:
        row["accepted"] = "no" if row["accepted"] == "yes" else "yes"
    write(tmp_path / "l.csv", first)
    assert "7 labels corrected" in vhs("labels", run, "import", tmp_path / "l.csv")
    vhs("labels", run, "export", tmp_path / "next.csv", "--most-uncertain", 7)
    assert not {row["key"] for row in rows_of(tmp_path / "next.csv")} & {row["key"] for row in first}
    assert "go with export" in vhs("labels", run, "import", tmp_path / "next.csv", "--most-uncertain", 3, code=1)


@pytest.mark.parametrize("suffix", [".csv", ".mat"])
def test_agreeing_moves_the_queue_on_and_trains_nothing(run, tmp_path, suffix):
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))

    def asked(file) -> set[str]:
        vhs("labels", run, "export", file, "--most-uncertain", 5)
        return {row["key"] for row in rows_of(file)} if suffix == ".csv" else set(loadmat(file, simplify_cells=True)["labels"]["key"])

    keys, identities = asked(first), [unit.identity for unit in opened(run).units("train")]
    assert "5 looked at and confirmed, 0 labels corrected" in vhs("labels", run, "import", first)
    assert len(keys) == 5 and len(asked(second)) == 5 and not keys & asked(second)
    assert [unit.identity for unit in opened(run).units("train")] == identities and labels.table(opened(run)).label_source.eq("machine").all()
    assert all(opened(run).done(unit) for _, units in opened(run).named() for unit in units), "nothing is left to do, not even the page"
    assert "nothing in it differs" in " ".join(vhs("labels", run, "import", first).split())
    assert len(list(run.glob("labels/confirmed/**/*.parquet"))) == 1 and not (run / "labels" / "corrections").exists()
    assert "0 errors" in vhs("verify", run, "--full")


def test_a_whole_export_with_three_rows_edited_is_three_looked_at(run, tmp_path):
    """And one more, of which the person says so. What the file does not claim was not looked at, though it was handed back."""
    vhs("labels", run, "export", tmp_path / "l.csv")
    rows = rows_of(tmp_path / "l.csv")
    assert {row["looked_at"] for row in rows} == {""}
    for row in rows[:3]:
        row["accepted"] = "no" if row["accepted"] == "yes" else "yes"
    rows[3]["looked_at"] = "yes"
    write(tmp_path / "l.csv", rows)
    assert "1 looked at and confirmed, 3 labels corrected: run" in " ".join(vhs("labels", run, "import", tmp_path / "l.csv").split())
    now = labels.table(opened(run))
    assert set(now.key[now.looked_at]) == {row["key"] for row in rows[:4]}
    vhs("labels", run, "export", tmp_path / "l.csv")
    assert {row["key"] for row in rows_of(tmp_path / "l.csv") if row["looked_at"] == "yes"} == {row["key"] for row in rows[:4]}
    assert labels.take(opened(run), tmp_path / "l.csv") == labels.Taken(0, 0), "handed back once more it claims nothing new"


def test_once_everything_was_looked_at_nothing_is_asked(run, tmp_path):
    keys = labels.table(opened(run)).key
    (tmp_path / "l.csv").write_text("key,looked_at\n" + "".join(f"{key},yes\n" for key in keys))
    writable = plan.reopen(str(run))
    assert labels.take(writable, tmp_path / "l.csv") == labels.Taken(0, len(keys))
    for name in ("none.csv", "none.mat"):
        assert labels.export(opened(run), tmp_path / name, tmp_path / "pictures", uncertain=5) == 0 and (tmp_path / name).exists()


def test_of_controls_too_if_one_asks(reference, tmp_path):
    """Most uncertain are the images that mixed trains on; whose an image is stands beside it."""
    run = plan.start(load("debug/demo", ["arms=[real-matched,mixed,base]", "generation.max_rounds=1"]), str(tmp_path / "run"))
    drive(run, reuse=str(reference), only="label")
    whole, asked = tmp_path / "l.csv", tmp_path / "asked.csv"
    assert labels.export(run, whole) == 48
    rows = rows_of(whole)
    assert [row["generator"] for row in rows] == ["dreambooth"] * 24 + ["base"] * 24
    assert all(row["shard"].startswith("generated/base/") == (row["generator"] == "base") for row in rows)
    assert labels.export(run, asked, uncertain=48) <= 24 and {row["generator"] for row in rows_of(asked)} == {"dreambooth"}
    assert labels.export(run, asked, uncertain=3, generator="base") == 3 and {row["generator"] for row in rows_of(asked)} == {"base"}
    with pytest.raises(labels.LabelError, match="no images of the generator 'null'; there are those of dreambooth, base"):
        labels.export(run, asked, generator="null")


def test_a_later_word_counts_and_the_mat_file_speaks_too(run, tmp_path):
    file = tmp_path / "l.mat"
    vhs("labels", run, "export", file)
    held = loadmat(file, simplify_cells=True)["labels"]
    key, word = str(held["key"][0]), str(held["accepted"][0])
    turned = {"yes": "no", "no": "yes"}[word]
    for said in (turned, word, turned):
        savemat(file, {"labels": {"key": np.array([key], object), "accepted": np.array([said], object), "points": held["points"][:1]}})
        assert "1 label corrected: run" in vhs("labels", run, "import", file)
    assert labels.table(opened(run)).set_index("key").accepted[key] == (turned == "yes")
    assert len(list(run.glob("labels/corrections/split/*.parquet"))) == 3


def test_faulty_rows_are_listed_and_nothing_is_imported(run, tmp_path):
    vhs("labels", run, "export", tmp_path / "l.csv")
    rows = rows_of(tmp_path / "l.csv")[:8]
    rows[0]["accepted"] = "no" if rows[0]["accepted"] == "yes" else "yes"  # this one is sound
    rows[1]["key"] = "0" * 16
    rows[2]["accepted"] = "perhaps"
    rows[3]["A_x"] = "nan"
    rows[4]["A_x"] = ""
    rows[5]["A_x"] = "4000"
    rows[6]["label"] = "huge"
    rows[7]["looked_at"] = "a bit"
    write(tmp_path / "l.csv", rows)
    said = " ".join(vhs("labels", run, "import", tmp_path / "l.csv", code=1).split())
    assert "7 faulty rows, nothing was imported" in said and "row 2:" not in said
    for text in (
        "row 3: no labelled image has the key '0000000000000000'",
        "row 4: accepted 'perhaps'; legal: yes",
        "row 5: a point that is not a number",
        "row 6: 11 of 12 coordinates, without A_x",
        "row 7: a point outside the image of 128 x 128",
        "row 8: label 'huge'; legal: small, normal, large",
        "row 9: looked_at 'a bit'; legal: yes",
    ):
        assert text in said, said
    assert not (run / "labels" / "corrections").exists() and not (run / "labels" / "confirmed").exists()
    savemat(tmp_path / "l.mat", {"labels": {"key": np.array([rows[0]["key"]], object), "points": np.zeros((1, 5, 2))}})
    assert "legal is (1, 6, 2)" in " ".join(vhs("labels", run, "import", tmp_path / "l.mat", code=1).split())
    (tmp_path / "l.mat").write_bytes((Path(__file__).parent / "corpus" / "mat" / "15d739e72596b249").read_bytes())
    assert "cannot be read as a .mat file: TypeError" in " ".join(vhs("labels", run, "import", tmp_path / "l.mat", code=1).split())
    (tmp_path / "l.csv").write_bytes("key,label\nß,groß\n".encode("latin-1"))
    assert "is no table in UTF-8" in " ".join(vhs("labels", run, "import", tmp_path / "l.csv", code=1).split())
    assert "a .csv or a .mat file" in vhs("labels", run, "export", tmp_path / "l.txt", code=1)


def test_corrections_replace_their_rows_alone():
    table = pd.DataFrame(
        {
            "key": ["a", "b"],
            "points": [[1.0], [2.0]],
            "index": [9.0, 9.5],
            "label": [1, 1],
            "accepted": [True, False],
            "reason": ["", "spread"],
            "label_source": "machine",
        }
    )
    said = table.iloc[[1]].assign(accepted=True, reason="", label_source="hand")
    now = labels.corrected(table, pd.concat([said.assign(accepted=False), said]))
    assert now.accepted.tolist() == [True, True] and now.label_source.tolist() == ["machine", "hand"] and now.accepted.dtype == bool
    assert labels.corrected(table, pd.DataFrame()) is table

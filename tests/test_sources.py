"""What users bring: tables beside images, class folders, and what is said when neither fits."""

from __future__ import annotations

import pytest

from vhs.measure import VIEWS
from vhs.sources import SourceError, scan

DOG, HUMAN = VIEWS["canine_lateral"], VIEWS["human_frontal"]


def _touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_class_folders_in_any_case_and_depth_with_their_split(tmp_path):
    _touch(
        tmp_path,
        "Dog_heart/Dog_heart/Train/Large/1.png",
        "Dog_heart/Dog_heart/Valid/SMALL/2.JPG",
        "Dog_heart/test/normal/3.dcm",
        "normal/4.tif",
        "notes/small.txt",
        "Test/5.png",
    )
    found = {source.file.rpartition("/")[2]: (source.label, source.split) for source in scan(tmp_path, DOG)}
    assert found == {"1.png": ("large", "train"), "2.JPG": ("small", "valid"), "3.dcm": ("normal", "test"), "4.tif": ("normal", None), "5.png": (None, "test")}


def test_a_table_with_points_patients_and_sources(tmp_path):
    _touch(tmp_path, "images/a.png", "b.png")
    (tmp_path / "t.csv").write_text(
        "\ufefffile,patient,source,split,A_x,A_y,B_x,B_y,C_x,C_y,D_x,D_y,E_x,E_y,F_x,F_y\r\n"
        "a.png,ann,s,Train,1,2,3,4,5,6,7,8,9,10,11,12\r\nb.png,,,,1,2,3,4,5,6,7,8,9,10,11,\r\n"
    )
    second, first = scan(tmp_path, DOG)  # by path: b.png before images/a.png
    assert (first.patient, first.source, first.split, first.points[5]) == ("ann", "s", "train", (11.0, 12.0)) and first.file.endswith(
        "images/a.png"
    )
    assert (second.patient, second.points) == (None, None) and second.file.endswith("/b.png")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ("name,class\na.png,small\n", "needs a column `file`, has name, class"),
        ("file,patient\na.png,ann\n", "needs `class`, `VHS` or the key points"),
        ("file,A_x,A_y\na.png,1,2\n", "only A_x, A_y are there"),
        ("file,class\na.png,tiny\n", "line 2: class 'tiny'; legal: small, normal, large"),
        ("file,class\n", "no image found"),
    ("file,class,split\na.png,small,holdout\n", "line 2: split 'holdout'; legal: train"),
    ("file,class\n,small\n", "line 2: names no file"),
    ],
)
def test_an_unusable_table_says_what_is_missing(tmp_path, table, says):
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(SourceError, match=says):
        scan(tmp_path, DOG)


def test_nothing_there_and_two_tables(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        scan(tmp_path / "nowhere", HUMAN)
    with pytest.raises(SourceError, match="no image found"):
        scan(tmp_path, HUMAN)
    _touch(tmp_path, "a.csv", "b.csv")
    with pytest.raises(SourceError, match="2 CSV files"):
        scan(tmp_path, HUMAN)

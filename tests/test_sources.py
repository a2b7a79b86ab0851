"""What users bring: tables beside images, class folders, and what is said when neither fits."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy.io import savemat

from jobs.data import open_data
from vhs.measure import VIEWS
from vhs.sources import SourceError
from vhs.sources.label import Unusable, settle

DOG, HUMAN = VIEWS["canine_lateral"], VIEWS["human_frontal"]


def scan(data, view, order=None):
    return open_data(str(data)).scan(view, order)


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


def test_numbered_class_folders_are_asked_about_never_guessed(tmp_path):
    _touch(tmp_path, "Train/0/1.png", "Train/1/2.png", "Valid/2/3.png", "Test/4.png")
    assert open_data(str(tmp_path)).layout() == "class folders that are numbered 0, 1, 2"
    with pytest.raises(SourceError, match=r"by its folders, gives classes as the numbers.*ingest.class_order=\[large,normal,small\]"):
        scan(tmp_path, DOG)
    found = {source.file.rpartition("/")[2]: (source.label, source.split) for source in scan(tmp_path, DOG, ("small", "normal", "large"))}
    assert found == {"1.png": ("small", "train"), "2.png": ("normal", "train"), "3.png": ("large", "valid"), "4.png": (None, "test")}
    _touch(tmp_path, "Train/3/5.png")
    with pytest.raises(SourceError, match="no image found with a label"):  # four kinds of something else
        scan(tmp_path, DOG)
    shutil.rmtree(tmp_path / "Train" / "3")
    _touch(tmp_path, "Train/small/5.png")
    assert open_data(str(tmp_path)).layout() == "class folders" and len([one for one in scan(tmp_path, DOG) if not one.reject]) == 2  # with the test image


def test_an_image_of_a_format_that_is_not_read_is_listed(tmp_path):
    _touch(tmp_path, "small/1.png", "large/2.bmp", "Valid/normal/3.webp", "large/notes.txt")
    rejects = {source.file.rpartition("/")[2]: (source.reject, source.split) for source in scan(tmp_path, DOG)}
    assert rejects["1.png"] == (None, None) and set(rejects) == {"1.png", "2.bmp", "3.webp"} and rejects["3.webp"][1] == "valid"
    assert all("not read" in rejects[name][0] and ".png" in rejects[name][0] for name in ("2.bmp", "3.webp"))


def test_a_table_with_points_patients_and_sources(tmp_path):
    _touch(tmp_path, "images/a.png", "b.png")
    (tmp_path / "t.csv").write_text(
        "\ufefffile,patient,source,split,A_x,A_y,B_x,B_y,C_x,C_y,D_x,D_y,E_x,E_y,F_x,F_y\r\n"
        "a.png,ann,s,Train,1,2,3,4,5,6,7,8,9,10,11,12\r\nb.png,,,,1,2,3,4,5,6,7,8,9,10,11,\r\n"
    )
    second, first = scan(tmp_path, DOG)  # by path: b.png before images/a.png
    assert (first.patient, first.source, first.split, first.points[5], first.file) == ("ann", "s", "train", (11.0, 12.0), "images/a.png")
    assert (second.patient, second.points, second.file) == (None, None, "b.png")


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
        ("file;VHS\na.png;9,8\n", "line 2: vhs '9,8' is no number: decimals have a point"),
        ("a.png;9,8\n", "line 1: index '9,8' is no number: decimals have a point"),
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


def _read(folder, table: str, view=DOG, order=None, images=("100.png", "101.png", "102.png")):
    _touch(folder, *(f"pictures/{name}" for name in images))
    (folder / "labels.csv").write_bytes(table.encode())
    return {source.file.rpartition("/")[2]: source for source in scan(folder, view, order)}


@pytest.mark.parametrize(
    "table",
    [
        "100.png,11.3614\r\n101.png,9.8021\r\n102.png,7\r\n",
        "ImageName,VHS\n100.png,11.3614\n101.png,9.8021\n102.png,7\n",
        "Filename,VHS\r\n102,7\r\n101,9.8021\r\n100,11.3614\r\n",
        "\ufeff\"ImageName\";\"VHS\"\r\n100.png;11.3614\r\n101.png;9.8021\r\n102.png;7\r\n",
        "100.png;11.3614\n101.png;9.8021\n102.png;7\n",
        "patient\tfile\tVHS\na\t100.png\t11.3614\n\t101.png\t9.8021\n\t102.png\t7\n",
    ],
)
def test_indices_by_name_with_and_without_a_header(tmp_path, table):
    found = _read(tmp_path, table)
    assert {name: source.index for name, source in found.items()} == {"100.png": 11.3614, "101.png": 9.8021, "102.png": 7.0}
    assert all(source.reject is None and source.label is None for source in found.values())


@pytest.mark.parametrize("table", ["100.png,Normal\r\n101.png,LARGE\r\n102.png,small\r\n", "file,class\n100.png,normal\n101.png,large\n102.png,small\n"])
def test_class_names(tmp_path, table):
    assert [source.label for source in _read(tmp_path, table).values()] == ["normal", "large", "small"]


@pytest.mark.parametrize("table", ["100.png,2\n101.png,0\n102.png,1\n", "image,label\n100.png,2\n101.png,0\n102.png,1\n"])
def test_class_numbers_are_asked_about_never_guessed(tmp_path, table):
    with pytest.raises(SourceError, match=r"ingest.class_order=\[large,normal,small\].* or ingest.class_order=\[small,normal,large\]"):
        _read(tmp_path, table)
    by_folder = [source.label for source in scan(tmp_path, DOG, ("large", "normal", "small"))]
    by_size = [source.label for source in scan(tmp_path, DOG, ("small", "normal", "large"))]
    assert by_folder == ["small", "large", "normal"] and by_size == ["large", "small", "normal"]


def test_what_a_table_leaves_over_is_listed(tmp_path):
    found = _read(tmp_path, "ImageName,VHS\n100.png,11.3\n999.png,9\n102.png,\n")
    rejects = {name: source.reject for name, source in found.items()}
    assert rejects["100.png"] is None and rejects["999.png"] == "label without an image"
    assert "image without a label" in rejects["102.png"] and rejects["101.png"] == "image without a label in labels.csv"
    assert {source.file.rpartition("/")[2] for source in scan(tmp_path / "labels.csv", DOG)} == {"100.png", "999.png", "102.png"}


def test_two_images_of_one_name_are_not_chosen_between(tmp_path):
    _touch(tmp_path, "again/100.png")
    _read(tmp_path, "100.png,9.1\n101.png,8.3\n")
    found = {source.file: source.reject for source in scan(tmp_path, DOG)}
    assert "2 images of this name" in found["100.png"] and found["pictures/101.png"] is None
    assert {"again/100.png", "pictures/100.png"} < set(found), "all three are listed"


def _label(file, points, **more):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".mat":
        return savemat(file, {"six_points": points, **more})
    return file.write_text(json.dumps({"six_points": points, **more}))


POINTS = np.arange(12.0).reshape(6, 2) ** 1.5


def test_label_files_of_the_field(tmp_path, real_data):
    """Double and single precision, JSON as a list and by name: the same points. And a file of the field itself."""
    for number, suffix in enumerate((".png", ".tif", ".dcm", ".jpg")):
        _touch(tmp_path, f"Dog_Heart_VHS/Train/Images/{number}{suffix}")
    labels = tmp_path / "Dog_Heart_VHS/Train/Labels"
    _label(labels / "0.mat", POINTS, VHS=[[9.5]])
    _label(labels / "1.mat", POINTS.astype(np.float32), VHS=np.float32([[9.5]]))
    _label(labels / "2.json", POINTS.tolist(), VHS=9.5)
    _label(labels / "3.json", {f"P{name}": pair for name, pair in zip("ABCDEF", POINTS.tolist(), strict=True)}, VHS=9.5)
    shutil.copy(real_data / "formats/Dog_Heart_VHS/Train/Labels/1_12.3_1.mat", labels)
    _touch(tmp_path, "Dog_Heart_VHS/Train/Images/1_12.3_1.png")
    found = scan(tmp_path, DOG)
    assert len(found) == 5 and all(source.split == "train" and not source.reject for source in found)
    real = next(source for source in found if source.name_index)
    assert real.name_index == 12.3 and DOG.measure(np.array(real.points)) == pytest.approx(12.315, abs=1e-3) == pytest.approx(real.index, abs=1e-3)
    for source in (source for source in found if source is not real):
        np.testing.assert_allclose(source.points, POINTS, rtol=1e-6)
        assert source.index == 9.5


def test_a_combined_tree_is_one_set_of_images_and_bad_labels_say_why(tmp_path):
    for split in ("Train", "Valid"):
        for name, label in (("1", "Large"), ("2", "small")):
            _touch(tmp_path, f"Data/{split}/Images/{name}.png", f"Data/{split}/Images_classes/{label}/{name}.png")
            _label(tmp_path / f"Data/{split}/Labels/{name}.mat", POINTS)
    _touch(tmp_path, "Data/Test_Images/Images/1.png", "__MACOSX/Data/Train/Images/._1.png", "Data/Train/Images_classes/Normal/2.png")
    _label(tmp_path / "Data/Valid/Labels/2.mat", POINTS[:4])
    (tmp_path / "Data/Valid/Labels/1.mat").write_bytes(b"MATLAB 5.0 torn")
    found = {source.file.removeprefix("Data/"): source for source in scan(tmp_path, DOG)}
    assert set(found) == {f"{split}/Images/{name}.png" for split in ("Train", "Valid") for name in "12"} | {"Test_Images/Images/1.png"}
    assert (found["Train/Images/1.png"].label, found["Train/Images/1.png"].reject) == ("large", None)
    assert (found["Test_Images/Images/1.png"].split, found["Test_Images/Images/1.png"].reject) == ("test", None)
    assert found["Train/Images/2.png"].reject == "lies in the class folders normal and small"
    assert "holds 4 key points, canine_lateral measures 6" in found["Valid/Images/2.png"].reject
    assert "damaged label 1.mat" in found["Valid/Images/1.png"].reject


def test_a_csv_beside_folders_that_say_it_all_is_asked_about(tmp_path):
    _touch(tmp_path, "small/100.png", "large/101.png")
    (tmp_path / "predictions.csv").write_text("100.png,Normal\n")
    with pytest.raises(SourceError, match="holds both predictions.csv and class folders"):
        scan(tmp_path, DOG)
    assert "predictions.csv without a header" in open_data(str(tmp_path / "predictions.csv")).layout()
    (tmp_path / "predictions.csv").unlink()
    assert open_data(str(tmp_path)).layout() == "class folders"


def _settle(points=None, shape=(400, 400), view=DOG, **said):
    return settle(said, points, view, shape)


DOG_POINTS = np.array([[278.07, 206.121], [327.664, 340.167], [170.622, 317.702], [367.556, 275.972], [182.278, 143.544], [396.873, 139.136]])
VHS = float(DOG.measure(DOG_POINTS))  # 9.65


def test_labels_that_agree_are_one_label():
    assert _settle(DOG_POINTS, label="normal", index=VHS + 0.04, name_index=round(VHS, 1)) == (1, pytest.approx(VHS))
    assert _settle(index=7.9) == (0, 7.9)
    assert _settle(index=8.22, label="small") == (1, 8.22)  # beside an edge rounding decides
    assert _settle() == (-1, pytest.approx(np.nan, nan_ok=True)) and _settle(label="large")[0] == 2
    assert _settle(name_index=12.0)[0] == -1, "a file name labels nothing"


def test_a_vhs_measured_in_a_squashed_image_does_not_unseat_the_points():
    """VHSMarker stores what it measures after a resize to 512 x 512; the points it stores are right."""
    squashed = float(DOG.measure(DOG_POINTS / (600, 400)))
    assert abs(squashed - VHS) > 0.5
    assert _settle(DOG_POINTS, (400, 600), index=squashed) == (1, pytest.approx(VHS))
    with pytest.raises(Unusable, match="contradiction"):
        _settle(DOG_POINTS, (400, 400), index=squashed)


@pytest.mark.parametrize(
    ("points", "said", "reason"),
    [
        (DOG_POINTS, {"index": 11.0}, f"contradiction: VHS {VHS:.4g} by its key points, 11 by its label"),
        (DOG_POINTS, {"name_index": 9.4}, f"VHS {VHS:.4g} by its key points, 9.4 by its file name"),
        (DOG_POINTS, {"label": "small"}, rf"normal \(VHS {VHS:.4g}\) by its key points, small by its folder"),
        (None, {"name_index": 9.4, "label": "small"}, r"normal \(VHS 9.4\) by its file name, small by its folder"),
        (None, {"index": 112.0}, "VHS 112 by its label is implausible: 4 to 16 are"),
        (None, {"index": float("nan")}, "VHS is not a number"),
        (DOG_POINTS * 3, {}, "outside the image of 400 x 400"),
        (np.zeros((6, 2)), {}, "two key points coincide"),
    ],
)
def test_labels_that_contradict_each_other_name_both(points, said, reason):
    with pytest.raises(Unusable, match=reason):
        _settle(points, **said)


def test_edges_of_ones_own_are_no_contradiction_of_folders_cut_by_the_published_ones():
    assert _settle(DOG_POINTS, view=DOG.with_edges((8.2, 9.0)), label="normal") == (2, pytest.approx(VHS))

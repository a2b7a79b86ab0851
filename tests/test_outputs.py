"""A command looks at the place of its output before its work, and says what is wrong with it; what it reads may be a folder of images."""

from __future__ import annotations

import csv

import pytest
from conftest import ROOT, vhs

from jobs import outputs, predict
from jobs.config import ConfigError
from vhs.phantom import draw
from vhs.radiograph import encode_png

READ_ONLY = "/proc/vhs"  # nobody makes a folder there, root neither


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    (folder / "more").mkdir()
    for seed, name in enumerate(("b.png", "a.PNG", "more/c.png", ".hidden.png")):
        (folder / name).write_bytes(encode_png(draw("canine_lateral", "textbook", seed, size_px=128).image))
    (folder / "notes.txt").write_text("no image")
    return folder


def test_places_are_judged_without_a_trace(tmp_path):
    (tmp_path / "file").touch()
    outputs.folder("--out", tmp_path / "new" / "er")
    outputs.file("--out", tmp_path / "new" / "table.csv")
    outputs.file("--out", tmp_path / "file")
    for check, path, says in [
        (outputs.folder, tmp_path / "file", "file is no folder: name a folder"),
        (outputs.folder, tmp_path / "file" / "below", "file is no folder"),
        (outputs.file, tmp_path, "is a folder: name a file in it"),
        (outputs.file, tmp_path / "file" / "table.csv", "file is no folder"),
        (outputs.folder, READ_ONLY, "nothing can be written in /proc"),
    ]:
        with pytest.raises(ConfigError, match=f"--out /.*{says}"):
            check("--out", tmp_path / path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_predict_measures_the_images_of_a_folder_in_order(films, tmp_path):
    table = tmp_path / "new" / "table.csv"
    vhs("predict", "canine_lateral", films, films / "b.png", "--out", table, "--overlay", tmp_path / "pictures")
    with table.open() as lines:
        measured = [row["file"] for row in csv.DictReader(lines)]
    assert measured == [str(films / name) for name in ("a.PNG", "b.png", "more/c.png", "b.png")]
    assert sorted(file.name for file in (tmp_path / "pictures").iterdir()) == ["a.PNG.png", "b.png-2.png", "b.png.png", "c.png.png"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a folder without an image: .png"):
        predict.listed([str(tmp_path / "empty")])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--out", READ_ONLY + "/table.csv"], "--out /proc/vhs: nothing can be written in /proc"),
        (["--out", "tests"], "--out tests is a folder: name a file in it"),
        (["--overlay", "setup.cfg"], "setup.cfg is no folder: name a folder"),
        (["--overlay", READ_ONLY], "--overlay /proc/vhs: nothing can be written in /proc"),
    ],
)
def test_predict_is_refused_before_it_measures(films, options, says):
    printed = vhs("predict", "canine_lateral", films, *options, code=1)
    assert says in printed and "VHS" not in printed and "Errno" not in printed


def test_no_configuration_is_written_where_none_can_be(films, tmp_path):
    assert "nothing can be written in /proc" in vhs("init", films, "--out", READ_ONLY + "/mine.yaml", code=1)
    assert "is a folder: name a file" in vhs("init", films, "--out", tmp_path, code=1)


def test_a_bench_is_refused_before_it_runs(tmp_path):
    assert "--json" in (said := vhs("bench", "write", "--json", tmp_path, code=1)) and "is a folder" in said
    printed = vhs("bench", "stream", "--url", "foo", code=1)
    assert "--url foo: a place in an object store, such as s3://bucket" in printed and not (ROOT / "foo").exists()


def test_a_single_image_is_no_data(films, tmp_path):
    for command in (["run", "debug/demo", f"data={films / 'b.png'}", "--out", tmp_path / "run"], ["init", films / "b.png", "--out", tmp_path / "mine.yaml"]):
        printed = vhs(*command, code=1)
        assert "is a single image: give the folder that holds it" in printed and "vhs predict" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("init", "says"), [("nosuch", "hub id, which is written org/name"), ("./no/where", "no folder here"), ("configs", "no model_index.json")]
)
def test_a_base_to_continue_from_is_looked_for_before_the_hub_is(tmp_path, init, says):
    printed = vhs("pretrain", "base", "--init", init, "--out", tmp_path / "base", code=1)
    assert f"--init = '{init}'" in printed and says in printed and "Retrying" not in printed and not (tmp_path / "base").exists()

"""Class images of the user's own: a concept's class_data_dir is used before anything is drawn, and never smuggles in a held-out patient."""

from __future__ import annotations

import io
import json

import pandas as pd
import pytest
from PIL import Image

from jobs import config, lineage, world
from jobs.attempt import attempt
from jobs.plan import Run
from jobs.stages import priors
from shards import manifest
from shards.sample import sample_key
from vhs.duplicates import perceptual_hash
from vhs.measure import CLASSES
from vhs.phantom import draw
from vhs.radiograph import decode, decode_png

FACES = {"small": 5, "normal": 1, "large": 0}  # images in each class's folder; 2 are wanted


@pytest.fixture
def run(tmp_path):
    concepts = []
    for shade, (name, count) in enumerate(FACES.items()):
        folder = tmp_path / "class" / name
        if count:
            folder.mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (60 + number, 30), (40 * shade + number,) * 3).save(folder / f"{number}.png")
        prompts = {"instance_prompt": f"photo of sks {name}", "class_prompt": f"photo of a {name} thing"}
        concepts.append({**prompts, "instance_data_dir": f"instance/{name}", "class_data_dir": str(folder)})
    file = tmp_path / "concepts_list.json"
    file.write_text(json.dumps(concepts))
    return Run(str(tmp_path / "run"), config.load("debug/demo", [f"dreambooth.concepts={file}", "priors.images=6"]))


def test_own_images_are_used_first_and_the_rest_is_drawn(run, tmp_path):
    units = {unit.path: unit for unit in priors.units(run)}
    assert {path: unit.params.get("images") for path, unit in units.items()} == {
        "priors/small/00001": None, "priors/normal/00000": 1, "priors/normal/00001": None, "priors/large/00000": 2,
    }  # fmt: skip
    world.set_environment(1)
    for path in ("priors/small/00001", "priors/normal/00000"):
        assert attempt(run.url, run.config, units[path]) == "done"
    run.refresh()
    rows = manifest.load(run.storage, paths=[units[path].marker for path in ("priors/small/00001", "priors/normal/00000")]).to_pandas()
    own = rows[rows.seed.isna()]
    files = sorted((tmp_path / "class" / "small").iterdir())[:2]
    assert own.key.tolist() == [sample_key(file.read_bytes()) for file in files] and set(own.prompt) == {"photo of a small thing"}
    assert rows.prompt.tolist()[2:] == ["photo of a normal thing"] and rows.prompted.tolist() == ["small", "small", "normal"]
    images = [decode_png(run.storage.read(row.path, row.offset, row.size)) for row in rows.itertuples()]
    side = run.config.resolution
    assert all(image.shape == (side, side) for image in images)
    grey = images[1]  # 61 x 30 pixels of grey 1, letterboxed: never squashed
    assert (grey > 0).any(1).sum() == pytest.approx(side * 30 / 61, abs=2) and (grey > 0).any(0).all()


def test_other_bytes_are_another_unit_and_a_change_under_way_is_an_error(run, tmp_path):
    before = {unit.path: unit.identity for unit in priors.units(run)}
    changed = tmp_path / "class" / "small" / "0.png"
    Image.new("L", (50, 50), 200).save(changed)
    frozen = {unit.path: unit for unit in priors.units(run)}
    assert {path: unit.identity for path, unit in frozen.items()} == before, "the list was frozen when the run began"
    with pytest.raises(ValueError, match="0.png changed since the run began"):
        attempt(run.url, run.config, frozen["priors/small/00001"])
    anew = {unit.path: unit.identity for unit in priors.units(Run(str(tmp_path / "other"), run.config))}
    assert {path for path in before if anew[path] != before[path]} == {"priors/small/00001"}


def test_a_class_image_that_cannot_be_read_is_named(run, tmp_path):
    (tmp_path / "class" / "small" / "0.png").write_bytes(b"no picture")
    own = next(unit for unit in priors.units(run) if unit.path == "priors/small/00001")
    with pytest.raises(ValueError, match="0.png.*damaged.*take it out"):
        attempt(run.url, run.config, own)


def test_a_held_out_patient_among_the_class_images_is_refused():
    real = pd.DataFrame({"key": ["a", "b", "c"], "patient": ["ann", "bob", "cid"], "phash": ["00" * 32, "0f" * 32, "ff" * 32]})
    given = pd.DataFrame({"key": ["x", "b"], "phash": ["f0" * 32, "33" * 32]})
    assert lineage.own_class_images(given, real, frozenset({"ann"}), 24).to_dict("list") == {"key": ["b"], "patient": ["bob"]}
    with pytest.raises(lineage.LeakError, match="class image b .* held-out patient bob"):
        lineage.own_class_images(given, real, frozenset({"bob"}), 24)
    assert lineage.own_class_images(given.head(0), real, frozenset({"bob"}), 24).empty


def test_a_held_out_film_in_another_format_is_refused_among_the_class_images():
    film, stranger = (draw("canine_lateral", "clinic", seed).image for seed in (1, 2))
    saved = io.BytesIO()
    Image.fromarray(film).save(saved, "JPEG", quality=85)
    real = pd.DataFrame({"key": ["a", "b"], "patient": ["ann", "bob"], "phash": [perceptual_hash(film), perceptual_hash(stranger)]})
    given = pd.DataFrame({"key": ["x"], "phash": [perceptual_hash(decode(saved.getvalue()))]})
    with pytest.raises(lineage.LeakError, match="class image x .* held-out patient ann"):
        lineage.own_class_images(given, real, frozenset({"ann"}), 24)
    assert lineage.own_class_images(given, real, frozenset({"bob"}), 24).to_dict("list") == {"key": ["a"], "patient": ["ann"]}


def test_without_concepts_a_class_has_one_unit_and_nothing_is_frozen(tmp_path):
    run = Run(str(tmp_path / "run"), config.load("debug/demo"))
    assert [unit.path for unit in priors.units(run)] == [f"priors/{name}/00000" for name in CLASSES]
    assert not run.storage.exists("priors/own.json")


def test_files_that_several_concepts_name_are_dealt_out_among_them(tmp_path):
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(7):
        Image.new("L", (30, 20), 30 * number).save(folder / f"{number}.png")
    prompts = {"instance_prompt": "photo of sks", "class_prompt": "photo of a thing", "class_data_dir": str(folder)}
    (tmp_path / "concepts.json").write_text(json.dumps([{**prompts, "instance_data_dir": name} for name in CLASSES]))
    run = Run(str(tmp_path / "run"), config.load("debug/demo", [f"dreambooth.concepts={tmp_path / 'concepts.json'}", "priors.images=9"]))
    units = priors.units(run)
    files = [item["file"] for unit in units for item in unit.params.get("files", [])]
    assert len(files) == len(set(files)) == 7 and sum(unit.params.get("images", 0) for unit in units) == 2

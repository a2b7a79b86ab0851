"""What a run begins with may lie in object storage: base, labeller, the classifier's weights, class images; so may what `vhs predict` measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import committed
from PIL import Image

from jobs import config, models, plan, predict
from jobs.config import ConfigError
from jobs.drive import drive
from shards import manifest
from shards.sample import sample_key
from shards.storage import open_storage
from vhs import networks
from vhs.measure import CLASSES
from vhs.phantom import draw
from vhs.radiograph import encode_png


def put(folder, url: str) -> str:
    """The files of `folder`, below `url`."""
    storage = open_storage(url)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        storage.put(file.relative_to(folder).as_posix(), file.read_bytes())
    return url


@pytest.fixture
def afar(bucket, tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("VHS_CACHE_DIR", str(tmp_path / "cache"))
    yield bucket
    models.here.cache_clear()
    models.fingerprint.cache_clear()


def test_models_afar_are_the_models_here(afar, reference, tmp_path, figure):
    """The debug run with its base and labeller in S3: the same bytes as far as the first image that the base draws."""
    base = put(models.WEIGHTS / "base", f"{afar}/models/sd")
    labeller = put(models.WEIGHTS / "labeller" / "canine_lateral", f"{afar}/models/labeller")
    run = plan.start(config.load("debug/demo", [f"base={base}", f"labeller.init={labeller}"]), str(tmp_path / "run"))
    for stage in ("labeller", "priors"):
        drive(run, only=stage)
    made = [
        {Path(name).name: sha for name, sha in committed(one).items() if name.startswith(("labeller/", "priors/")) and name.endswith((".tar", ".safetensors"))}
        for one in (run.url, reference)
    ]  # sidecars and folders are named after the settings, in which the place stands
    figure(f"base and labeller in S3: compared {len(made[0])} files with the reference's")
    assert len(made[0]) > 3 and made[0] == made[1]


def test_weights_afar_begin_a_training(afar, tmp_path):
    settings = config.load("debug/demo").classifier
    (tmp_path / "weights").mkdir()
    networks.save_classifier(networks.build_classifier(settings, seed=3), settings, tmp_path / "weights")
    there = settings.model_copy(update={"weights": put(tmp_path / "weights", f"{afar}/weights")})
    here = settings.model_copy(update={"weights": str(tmp_path / "weights")})
    one, other = (networks.build_classifier(models.begun_from(choice)).state_dict() for choice in (there, here))
    assert len(one) > 10 and all(torch.equal(one[name], other[name]) for name in one)
    assert models.fingerprint(models.begun_from(there).weights) == models.fingerprint(here.weights)


def test_class_images_afar_are_used_first(afar, tmp_path):
    concepts = []
    for shade, name in enumerate(CLASSES):
        folder = tmp_path / "class" / name
        folder.mkdir(parents=True)
        Image.new("L", (30, 20), 40 * shade).save(folder / "0.png")
        there = put(folder, f"{afar}/class/{name}")
        prompts = {"instance_prompt": f"photo of sks {name}", "class_prompt": f"photo of a {name} thing"}
        concepts.append({**prompts, "instance_data_dir": name, "class_data_dir": there})
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    run = plan.start(config.load("debug/demo", [f"dreambooth.concepts={tmp_path / 'concepts.json'}", "priors.images=3"]), str(tmp_path / "run"))
    drive(run, only="priors")
    run.refresh()
    rows = manifest.load(run.storage, paths=run.committed("priors")).to_pandas()
    files = [(tmp_path / "class" / name / "0.png").read_bytes() for name in rows.prompted]
    assert set(rows.prompted) == set(CLASSES) and rows.key.tolist() == [sample_key(file) for file in files] and rows.seed.isna().all()


def test_predict_measures_from_afar_with_a_labeller_from_afar(afar, tmp_path):
    labeller = put(models.WEIGHTS / "labeller" / "canine_lateral", f"{afar}/labeller")
    (tmp_path / "film.png").write_bytes(encode_png(draw("canine_lateral", "textbook", 5, size_px=128).image))
    open_storage(f"{afar}/films").put("film.png", (tmp_path / "film.png").read_bytes())
    files = [str(tmp_path / "film.png"), f"{afar}/films/film.png", f"{afar}/films/none.png"]
    here, there, none = predict.predict(predict.open_labeller(labeller), files)
    assert here.points is not None and here.index == there.index and here.points.tolist() == there.points.tolist()
    assert none.points is None and "not read" in none.note and "none.png" in none.note


def test_a_model_that_is_not_there_is_named(afar):
    with pytest.raises(ConfigError, match="nothing/base: no model lies there"):
        models.fingerprints(config.load("debug/demo", [f"base={afar}/nothing/base"]))

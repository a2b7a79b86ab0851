"""What a run cannot use is said before it begins, all of it, by its dry run and its real start alike; and nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from conftest import vhs

from jobs import models, plan, preflight
from jobs.config import ConfigError, load
from jobs.preflight import Place

HERE = Place()
NO_SLURM = {"SLURM_CONF": "/nowhere/slurm.conf"}


def said(tmp_path, *overrides: str, place: Place = HERE, scope: str | None = None, name: str = "debug/demo") -> str:
    """What stops a new run with these `overrides`; "" where nothing does."""
    run = plan.Run(str(tmp_path / "run"), load(name, list(overrides)), read_only=True)
    try:
        preflight.refuse(run, place, scope)
    except ConfigError as error:
        return str(error)
    finally:
        assert not (tmp_path / "run").exists()
    return ""


def test_dry_run_and_start_say_all_that_would_stop_it(tmp_path):
    (tmp_path / "file").touch()
    wrong = ("labeller.init=/nope", "classifier.model=resnet5000", "classifier.weights=/nor/this", "split.folds=50", "base=./nowhere")
    for dry in ([], ["--dry-run"]):
        printed = vhs("run", "debug/demo", *wrong, "--out", tmp_path / "file" / "run", *dry, code=1)
        lines = printed.strip().splitlines()
        assert lines[0].endswith("6 things would stop it") and all(line.startswith("- ") for line in lines[1:]) and len(lines) == 7
        for what in ("'/nope' is no labeller", "no such model", "'/nor/this' is neither", "among 50 folds", "'./nowhere' is no folder", "--out"):
            assert what in printed
    assert os.listdir(tmp_path) == ["file"]


def test_what_can_be_used_is_let_pass(tmp_path):
    labeller = models.WEIGHTS / "labeller" / "canine_lateral"
    assert said(tmp_path) == said(tmp_path, f"labeller.init={labeller}", f"base={models.WEIGHTS / 'base'}") == ""
    assert said(tmp_path, "labeller.init=scratch", "labeller.size_px=96", "classifier.model=resnet26t", "split.folds=2", scope="fold-1") == ""


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("classifier.model=resnet5000", "no such model; it has resnet"),
        ("classifier.model=resnet18.nope", "no weights of that tag; it has resnet18.a1_in1k"),
        ("labeller.size_px=96", "measures canine_lateral at 128 px, the run wants canine_lateral at 96 px"),
        ("base=nosuch", "'nosuch' is no folder here"),
        ("base=./org/name", "'./org/name' is no folder here"),
        ("base=org/name", "needs base_revision"),
        ("base=configs", "no model_index.json"),
        ("report.inception=/nope.pth", "is no file"),
        ("data=nowhere", "'nowhere' does not exist"),
        ("split.test_sources=[elsewhere]", "names elsewhere; the data's sources are clinic"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(tmp_path, override, says):
    assert says in said(tmp_path, override)


@pytest.mark.parametrize(
    ("file", "wrong", "says"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, "its UNet has the addition_embed_type 'text_time'"),
        ("unet/config.json", {"in_channels": 9}, "its UNet takes 9 channels for 4 of latents"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "its scheduler has the prediction_type 'sample'"),
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["t", "u"]}, "StableDiffusionXLPipeline, it has a text_encoder_2"),
        ("unet/config.json", None, "it has no unet/config.json"),
    ],
)
def test_a_base_of_another_kind_is_named_by_its_configuration(tmp_path, file, wrong, says):
    """The same folder, as it came, is taken. No weights are there to be looked at."""
    base = tmp_path / "base"
    shutil.copytree(models.WEIGHTS / "base", base, ignore=shutil.ignore_patterns("*.safetensors"))
    assert said(tmp_path, f"base={base}") == ""
    models._unusable.cache_clear()  # as in the next process
    if wrong is None:
        (base / file).unlink()
    else:
        (base / file).write_text(json.dumps({**json.loads((base / file).read_text()), **wrong}))
    found = said(tmp_path, f"base={base}")
    assert says in found and "legal is" in found and "epsilon or v_prediction" in found


def test_a_scope_that_the_plan_lacks_begins_no_run(tmp_path):
    assert "the plan's scopes are split, fold-0, fold-1" in said(tmp_path, "split.folds=2", scope="fold-2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_is_asked_for_only_where_the_run_happens(tmp_path):
    words = ("execution.device=cuda", "dreambooth.mixed_precision=fp16")
    asked = said(tmp_path, *words)
    assert "no GPU here: set execution.device=auto, dreambooth.mixed_precision=no" in asked and "--gpus 1" in asked
    assert said(tmp_path, *words, place=Place(planned=True, gpus=True)) == ""
    assert said(tmp_path, *words, "data=nowhere", place=Place(planned=True)) == ""
    assert "set these" in said(tmp_path, "execution.device=cpu", "dreambooth.optimizer=adamw_8bit")


def test_more_folds_than_patients_of_the_smallest_class_are_refused(tmp_path, real_data):
    """90 films of 30 patients are listed; their classes are counted by patient, before one is opened."""
    lines = (real_data / "ctr" / "labels.csv").read_text().splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.csv").write_text("\n".join([f"{lines[0]},patient", *(f"{line},p{n // 3}" for n, line in enumerate(lines[1:91]))]) + "\n")
    for line in lines[1:91]:
        shutil.copy(real_data / "ctr" / "images" / line.split(",")[0], tmp_path / "data")
    data = f"data={tmp_path / 'data'}"
    assert said(tmp_path, data, "split.folds=2", name="debug/ctr") == ""
    refused = said(tmp_path, data, "split.folds=31", name="debug/ctr")
    assert "patients to share among 31 folds" in refused and "lower split.folds" in refused


def test_slurm_and_ray_are_looked_up_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    printed = vhs("run", "debug/demo", "--out", run, "--on", "slurm", "--cluster", "nosuch", environment={**NO_SLURM, "PATH": "/nowhere"}, code=1)
    assert "2 things" in printed and "no site 'nosuch'" in printed and "testcluster" in printed
    assert "no sbatch, squeue, scancel here" in printed and "login node" in printed
    closed = {"RAY_ADDRESS": "127.0.0.1:9"}
    assert "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in vhs("run", "debug/demo", "--out", run, "--on", "ray", environment=closed, code=1)
    assert not run.exists()


def test_cancel_and_retry_say_that_slurm_is_missing(tmp_path):
    from jobs import elsewhere

    run = plan.start(load("debug/demo"), str(tmp_path / "run"))
    elsewhere.remember(run, "local", None)
    printed = vhs("cancel", tmp_path / "run", environment={"PATH": "/nowhere"}, code=1)
    assert "no sbatch, squeue, scancel here" in printed and "last started --on local" in printed
    elsewhere.remember(run, "slurm", "testcluster")
    for command in ("cancel", "retry"):
        printed = vhs(command, tmp_path / "run", environment={"PATH": "/nowhere"}, code=1)
        assert "no sbatch, squeue, scancel here" in printed and "--on local" not in printed
    if shutil.which("squeue"):
        assert "no SLURM answers them" in vhs("cancel", tmp_path / "run", environment=NO_SLURM, code=1)
